"""Where steps share what is big: a volume that all pods mount, or a folder of an object store.

`FLAGSCALE_SHARED` names it: a path, or a URL such as `s3://bucket/distillation`. Artifacts then lie
there, named by their content, and what travels through KFP is a small pointer. Without the variable
the artifacts themselves travel.
"""

from __future__ import annotations

import os
from pathlib import Path

from flagscale import variables
from flagscale.artifacts import Manifest
from flagscale.shared.bucket import Bucket
from flagscale.shared.place import ANEW, ARTIFACTS, Place, name_of, pointer_to
from flagscale.shared.pointer import Pointer, read_pointer, write_pointer
from flagscale.shared.store import is_url
from flagscale.shared.volume import Volume

__all__ = [
    "ANEW",
    "Place",
    "Pointer",
    "damage",
    "fetch",
    "location_of",
    "manifest_of",
    "pointer_to",
    "read_pointer",
    "shared_place",
    "write_pointer",
]


def shared_place() -> Place | None:
    """The place that `FLAGSCALE_SHARED` names; None where there is none.

    Raises:
        UserError: there is no such folder.
    """
    location = os.environ.get(variables.SHARED, "")
    if not location:
        return None
    return Bucket(location) if is_url(location) else Volume(Path(location))


def location_of(manifest: Manifest, path: Path) -> str:
    """Where an artifact that a step has written at `path` is to be found once it is published."""
    place = os.environ.get(variables.SHARED, "").rstrip("/")
    return f"{place}/{ARTIFACTS}/{name_of(manifest)}" if place else str(path.absolute())


def fetch(pointer: Pointer, folder: Path) -> Path:
    """Find what a pointer points to, and check that it is what was written.

    The manifest is compared with the pointer here; files are compared with the manifest by
    `open_artifact`.

    Args:
        pointer: of an artifact.
        folder: to make, and download into, if the artifact is in an object store.

    Returns:
        The artifact's folder.

    Raises:
        UserError: it is not there, or is another one.
    """
    return _place_of(pointer).fetch(pointer, folder)


def manifest_of(pointer: Pointer) -> Manifest:
    """The manifest of what a pointer points to; nothing else is fetched.

    Raises:
        UserError: it is not there, or is another one.
    """
    return _place_of(pointer).manifest(pointer)


def damage(pointer: Pointer) -> str | None:
    """What is wrong with what a pointer points to, None if nothing.

    On a volume every file is read; in an object store names and sizes are compared.
    """
    return _place_of(pointer).damage(pointer)


def _place_of(pointer: Pointer) -> type[Place]:
    return Bucket if is_url(pointer.location) else Volume
