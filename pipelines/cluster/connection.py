"""Where a KFP server is and who asks, before it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flagscale.errors import UserError
from pipelines.cluster.access import check_host, read_token, sendable


@dataclass(frozen=True)
class Connection:
    """Where the server is and who asks; names and meaning are those of `kfp.Client`.

    Attributes:
        token_file: read again at each request, so that a renewed token is used.
    """

    host: str | None = None
    namespace: str | None = None
    existing_token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    cookies: str | None = field(default=None, repr=False)
    client_id: str | None = None
    other_client_id: str | None = None
    other_client_secret: str | None = field(default=None, repr=False)
    ssl_ca_cert: Path | None = None
    kube_context: str | None = None
    ui_host: str | None = None

    def __post_init__(self) -> None:
        if self.host is not None:
            check_host(self.host)
        if self.existing_token is not None and self.token_file is not None:
            raise UserError("--existing-token and --token-file: give one of them")
        for path in (self.token_file, self.ssl_ca_cert):
            if path is not None and not path.is_file():
                raise UserError(f"{path}: no such file")
        for name in ("existing_token", "cookies"):
            secret = getattr(self, name)
            if secret is not None:
                option = f"--{name.replace('_', '-')} or KFP_{name.upper()}"
                object.__setattr__(self, name, sendable(secret, option))
        if self.token_file is not None:
            read_token(self.token_file)

    @property
    def secrets(self) -> list[str]:
        """What no message may hold."""
        known = [self.existing_token, self.cookies, self.other_client_secret]
        if self.token_file is not None and self.token_file.is_file():
            known.append(read_token(self.token_file))
        return [secret for secret in known if secret]
