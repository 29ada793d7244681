"""The files that a source names: on this machine, or behind any URL that fsspec knows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import aiohttp
import fsspec

from flagscale.data.splits import of_split
from flagscale.errors import UserError
from flagscale.patience import patiently
from flagscale.recipe.data import CorpusRecipe
from flagscale.shared.passing import passes

logger = logging.getLogger(__name__)

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


class File(NamedTuple):
    """A file, wherever it is."""

    filesystem: Any  # fsspec.AbstractFileSystem, which has no type information
    path: str

    @classmethod
    def at(cls, place: str) -> File:
        """The file, folder or pattern of a path or URL; what exists here is taken as it stands."""
        if os.path.lexists(place):
            return cls(fsspec.filesystem("file"), os.path.abspath(place))
        return cls(*fsspec.url_to_fs(place))

    def open(self, packed: bool = False) -> IO[bytes]:
        """Open it for reading, unpacked unless it is to be left as it is."""
        compression = None if packed else _COMPRESSIONS.get(_endings(self.path)[-1])
        return self.filesystem.open(self.path, "rb", compression=compression)


def kind_of(path: str) -> str | None:
    """What a path's ending says that is in it, before that of a compression; None if nothing."""
    endings = _endings(path)
    if endings[-1] in _COMPRESSIONS:
        endings.pop()
    return KINDS.get(endings[-1]) if endings else None


def _endings(path: str) -> list[str]:
    """At least one, in small letters."""
    return [ending.lower() for ending in PurePosixPath(_name(path)).suffixes] or [""]


def _name(path: str) -> str:
    """What comes before a URL's query."""
    return path.partition("?")[0] if _is_web(path) else path


def list_files(corpus: CorpusRecipe) -> list[File]:
    """Files of a path, folder, glob or URL, sorted by path.

    Of a folder those of `corpus.split`; hidden ones and a data set's card are left out, and files
    of unknown kinds unless `corpus.format` says what they are.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    where = f"data.source={corpus.source!r}"
    source = os.path.expanduser(corpus.source)
    try:
        filesystem, folder, paths = patiently(lambda: _list(source), f"list {source}", passes)
    except Exception as error:  # each kind of storage raises its own
        raise UserError(f"{where} cannot be opened: {first_line(error)}") from error
    if not paths:
        raise UserError(f"{where}: no such file, or no files there")
    kinds = _expected_kinds(corpus)
    chosen = [path for path in paths if kinds is None or kind_of(path) in kinds]
    if not chosen:
        known = ", ".join(ending for ending, kind in KINDS.items() if kind in (kinds or ()))
        hint = "" if corpus.format == "chat" else "; set data.format"
        raise UserError(
            f"{where}: {len(paths)} file(s), first {paths[0]}, none with a known ending "
            f"({known}){hint}"
        )
    if folder is None and corpus.split != "train":
        raise UserError(f"{where} names files, which have no data.split={corpus.split!r}")
    if folder is not None:
        names = [path.removeprefix(folder).lstrip("/") for path in chosen]
        chosen = [f"{folder}/{name}" for name in of_split(corpus, names)]
    if len(chosen) < len(paths):
        others = sorted(set(paths) - set(chosen))
        logger.warning("%s: %d files left out, first %s", where, len(others), others[0])
    return [File(filesystem, path) for path in sorted(chosen)]


def _expected_kinds(corpus: CorpusRecipe) -> set[str] | None:
    """What may be read; None: whatever is there, since the recipe says what it is."""
    if corpus.format not in ("auto", "chat"):
        return None
    return {kind for kind in KINDS.values() if corpus.format == "auto" or kind != "text"}


def is_glob(source: str) -> bool:
    """Whether a path or URL may stand for several."""
    return any(sign in _name(source) for sign in "*?[")


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def _is_web(source: str) -> bool:
    return source.startswith(("http:", "https:"))


def _list(source: str) -> tuple[Any, str | None, list[str]]:
    """The filesystem; a folder if it is one; the files."""
    filesystem, path = File.at(source)
    filesystem.invalidate_cache()  # of an earlier look
    # Whatever signs are in a name, it may exist; but no web server is asked for a star.
    info = None if _is_web(source) and "*" in _name(source) else _info(filesystem, path)
    if info is None:
        return filesystem, None, _glob(filesystem, path) if is_glob(source) else []
    is_page = _is_web(source)  # which may list files, and is no folder by what it says itself
    if info["type"] == "directory" or (is_page and not kind_of(path) and filesystem.isdir(path)):
        return filesystem, path.rstrip("/"), list(_shown(filesystem.find(path), path))
    return filesystem, None, [path]


def _info(filesystem: Any, path: str) -> dict[str, Any] | None:  # noqa: ANN401
    try:
        info: dict[str, Any] = filesystem.info(path)
    except FileNotFoundError as error:
        # So fsspec says of every URL that does not answer well.
        if isinstance(error.__cause__, aiohttp.ClientError) and not _is_missing(error.__cause__):
            raise error.__cause__ from None
        return None
    return info


def _glob(filesystem: Any, pattern: str) -> list[str]:  # noqa: ANN401
    # Asking for each whether it is a file would leave out those for which nobody answers.
    paths = []
    for path, info in filesystem.glob(pattern, detail=True).items():
        if info["type"] != "directory":
            paths.append(path)
        elif kind_of(path):  # Spark's corpus.parquet/
            paths += filesystem.find(path)
    return list(_shown(paths, pattern))


def _shown(paths: Iterable[str], source: str) -> Iterable[str]:
    """Those that are not hidden below the source, nor a program's leftovers."""
    asked = _hidden_parts(source)
    return (path for path in paths if _hidden_parts(path) <= asked)


def _hidden_parts(path: str) -> int:
    *folders, _ = path.split("/")
    special = sum(part.startswith("__") or part == "_temporary" for part in folders)
    return special + sum(part.startswith(".") for part in path.split("/"))


def _is_missing(error: aiohttp.ClientError) -> bool:
    return isinstance(error, aiohttp.ClientResponseError) and error.status in (404, 410)
