"""What a KFP server is reached with, checked before KFP's client uses it.

The client puts a token that no header can hold into its error, and asks http://localhost where it
finds no kubeconfig.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from kfp.client import TokenCredentialsBase
from kubernetes.client import Configuration

from flagscale.errors import UserError
from flagscale.secrets import mask


class TokenFile(TokenCredentialsBase):
    """A file with the token, read again at each request."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def refresh_api_key_hook(self, config: Configuration) -> None:
        """See KFP."""
        config.api_key["authorization"] = read_token(self._path)


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        UserError: there is none, or it cannot be sent.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"token file {path}: {error.strerror}") from None
    token = sendable(text, f"token file {path}")
    if not token:
        raise UserError(f"token file {path}: is empty")
    return token


def sendable(secret: str, where: str) -> str:
    """A token or cookie as a header of HTTP holds it: without the end of its line.

    Args:
        secret: is told to nobody.
        where: it comes from.

    Raises:
        UserError: a character in it cannot be sent.
    """
    text = secret.strip()
    if not (text.isascii() and text.isprintable()):
        raise UserError(f"{where}: must be one line of printable ASCII; copy it again")
    return text


def check_host(host: str) -> None:
    """A host with credentials, or copied from the browser, would fail in obscure ways.

    Raises:
        UserError: it is no address of a KFP server.
    """
    parts = urlsplit(host if "://" in host else f"https://{host}")
    plain = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    if parts.username or parts.password:
        raise UserError(
            f"host {plain}: holds a user name or password, which KFP's client would ignore; "
            "give a token in KFP_EXISTING_TOKEN"
        )
    if parts.query or parts.fragment or not parts.hostname:
        raise UserError(f"host {host!r}: must be like https://kfp.example.com/pipeline")
    if parts.scheme not in ("http", "https"):
        raise UserError(f"host {host!r}: must start with http:// or https://")


def check_cluster(context: str | None) -> None:
    """Check that KFP's client will find the cluster by itself: inside it, or in a kubeconfig.

    Args:
        context: kubectl's; None: the current one.

    Raises:
        UserError: there is no kubeconfig, a broken one, or no such context.
    """
    from kubernetes import config

    try:
        config.load_incluster_config()
        return
    except config.ConfigException:
        pass
    files = config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION
    if not any(os.path.exists(os.path.expanduser(file)) for file in files.split(os.pathsep)):
        raise no_server_named()
    try:
        config.load_kube_config(context=context, client_configuration=Configuration())
    except Exception as error:  # of a file with any content
        what = f"kubeconfig {files}" if context is None else f"--kube-context {context}"
        broken = "" if isinstance(error, config.ConfigException) else "broken: "
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: {broken}{mask(reason)}{_known_contexts()}") from None


def no_server_named() -> UserError:
    """What to do where nothing says which server is meant."""
    return UserError(
        "no server is named: give --host or KFP_ENDPOINT, e.g. https://kfp.example.com. Without an "
        "address of its own, forward a port: kubectl port-forward --namespace kubeflow "
        "svc/ml-pipeline-ui 8080:80, then --host http://localhost:8080"
    )


def _known_contexts() -> str:
    from kubernetes import config

    try:
        contexts, _current = config.list_kube_config_contexts()
    except Exception:  # the same file
        return ""
    return "; known contexts: " + ", ".join(str(context["name"]) for context in contexts)
