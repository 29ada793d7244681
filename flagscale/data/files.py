"""Files of text: on this machine, or behind any URL that fsspec knows."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, NamedTuple

import aiohttp
import fsspec

from flagscale.errors import UserError
from flagscale.patience import patiently
from flagscale.shared.passing import passes


class File(NamedTuple):
    """A file, wherever it is."""

    filesystem: Any  # fsspec.AbstractFileSystem, which has no type information
    path: str

    def open(self, compression: str | None = "infer") -> IO[bytes]:
        """Open it for reading, unpacked."""
        return self.filesystem.open(self.path, "rb", compression=compression)


def list_files(source: str, is_folder: bool) -> list[File]:
    """Files of a path, folder, glob or URL, sorted by path; hidden ones in folders left out.

    Args:
        source: as the recipe names it.
        is_folder: whether it may be a folder.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    local = str(Path(source).expanduser()) if source.startswith("~") else source
    try:
        filesystem, paths = patiently(lambda: _list(local, is_folder), f"list {source}", passes)
    except Exception as error:  # each kind of storage raises its own
        raise UserError(f"data.source={source!r} cannot be opened: {first_line(error)}") from error
    if not paths:
        raise UserError(f"data.source={source!r}: no such file, or no files there")
    return [File(filesystem, path) for path in sorted(paths)]


def is_glob(source: str) -> bool:
    """Whether a path or URL stands for several."""
    signs = "*[" if source.startswith(("http:", "https:")) else "*?["
    return any(sign in source for sign in signs)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def _list(source: str, is_folder: bool) -> tuple[Any, list[str]]:
    filesystem, path = fsspec.url_to_fs(source)
    if is_glob(source):
        # Asking for each whether it is a file would leave out those for which nobody answers.
        found = filesystem.glob(path, detail=True)
        return filesystem, [p for p, info in found.items() if info["type"] != "directory"]
    if is_folder and filesystem.isdir(path):
        inside = ((p, p.removeprefix(path)) for p in filesystem.find(path))
        return filesystem, [p for p, relative in inside if "/." not in f"/{relative}"]
    try:
        filesystem.info(path)
    except FileNotFoundError as error:
        # So fsspec says of every URL that does not answer well.
        if isinstance(error.__cause__, aiohttp.ClientError) and not _is_missing(error.__cause__):
            raise error.__cause__ from None
        return filesystem, []
    return filesystem, [path]


def _is_missing(error: aiohttp.ClientError) -> bool:
    return isinstance(error, aiohttp.ClientResponseError) and error.status in (404, 410)
