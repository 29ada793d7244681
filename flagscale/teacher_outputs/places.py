"""Where an artifact's files are read from: a folder, or an object store, of which never the whole.

What records are is left to the reader; here are files, and parts of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from flagscale.artifacts import Manifest, check_file, check_names, open_artifact
from flagscale.errors import UserError
from flagscale.shared import Pointer, damage, manifest_of, read_pointer
from flagscale.shared.store import ObjectStore, is_url

Range = tuple[str, int, int]  # a file, where a part of it begins, its bytes


class OutputsPlace(Protocol):
    """The files of one artifact.

    Attributes:
        name: for messages.
        manifest: of the artifact.
    """

    name: str
    manifest: Manifest

    def read(self, file: str) -> bytes:
        """A whole file, compared with the manifest.

        Raises:
            UserError: it is another, or cannot be read.
        """

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Parts of files, as they are there; fewer bytes where a file ends early.

        Raises:
            UserError: a file cannot be read.
        """


def place_of(path: Path, kind: str) -> OutputsPlace:
    """What is at `path`, the artifact itself or a pointer to it; its names and sizes are checked.

    Raises:
        UserError: there is none, one of another kind, or one that lacks something.
    """
    pointer = read_pointer(path)
    if pointer is None:
        return Folder(path, kind)
    if is_url(pointer.location):
        return Bucket(pointer, kind)
    manifest_of(pointer)
    return Folder(Path(pointer.location), kind)


class Folder:
    """See `OutputsPlace`. No file stays open, so it survives a fork."""

    def __init__(self, folder: Path, kind: str) -> None:
        """See `place_of`."""
        self._folder, self.name = folder, str(folder)
        self.manifest = open_artifact(folder, kind, check_files=False)
        check_names(folder, self.manifest)

    def read(self, file: str) -> bytes:
        """See `OutputsPlace.read`."""
        check_file(self._folder, self.manifest, file)
        return (self._folder / file).read_bytes()

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `OutputsPlace.ranges`."""
        found = []
        try:
            for name, start, size in ranges:
                with (self._folder / name).open("rb", buffering=0) as file:
                    file.seek(start)
                    found.append(file.read(size))
        except OSError as error:
            raise UserError(f"{self.name}: {name} cannot be read: {error}") from error
        return found


class Bucket:
    """See `OutputsPlace`: a folder of an object store; what is asked for travels, and no more."""

    def __init__(self, pointer: Pointer, kind: str) -> None:
        """See `place_of`."""
        self._store, self.name = ObjectStore(pointer.location), pointer.location
        wrong = damage(pointer)
        if wrong is not None:
            raise UserError(wrong)
        self.manifest = manifest_of(pointer)
        if self.manifest.kind != kind:
            raise UserError(f"{self.name}: is a {self.manifest.kind!r}, but a {kind!r} is needed")

    def read(self, file: str) -> bytes:
        """See `OutputsPlace.read`."""
        content = self._store.read(file)
        found = None if content is None else f"sha256:{hashlib.sha256(content).hexdigest()}"
        if content is None or found != self.manifest.files[file]:
            raise UserError(
                f"{self.name}: {file} is missing or changed; make the {self.manifest.kind} anew"
            )
        return content

    def ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `OutputsPlace.ranges`."""
        return self._store.read_ranges(ranges)
