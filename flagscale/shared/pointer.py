"""Pointers: what stands at KFP's path of an artifact that lies on the shared place.

A pointer is a folder with one file, `pointer.json`. There is no manifest beside it, so that nothing
that reads artifacts takes it for one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from flagscale.artifacts import flush, write_json
from flagscale.errors import UserError

POINTER = "pointer.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Pointer:
    """Where an artifact is, and which one.

    Attributes:
        kind: see `flagscale.artifacts.Manifest`.
        digest: of the manifest, which has the hash of every file.
        location: an absolute path or a URL.
        bytes: of all files, the manifest included.
        format_version: of this file.
    """

    kind: str
    digest: str
    location: str
    bytes: int
    format_version: int = FORMAT_VERSION


def write_pointer(pointer: Pointer, path: Path) -> None:
    """Put a pointer at `path`, in place of what is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    write_json(path / POINTER, asdict(pointer))
    flush(path)


def read_pointer(path: Path) -> Pointer | None:
    """The pointer at `path`; None if something else is there, or nothing.

    Raises:
        UserError: it is damaged, or of another version.
    """
    file = path / POINTER
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a pointer to an artifact: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {version}, this program reads {FORMAT_VERSION}; make the "
            "artifact anew"
        )
    try:
        return Pointer(**values)
    except TypeError as error:
        raise UserError(f"{file}: not a pointer to an artifact: {error}") from error
