"""What a remote source holds just now, told without reading it: by what storages and hubs say.

A cache that knows a source by its address takes what was read long ago for what is there now. On
this machine sizes and times of files tell (`pipelines.local.preflight`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flagscale.artifacts import digest
from flagscale.data.files import File, list_files
from flagscale.data.sources import kind_of_source
from flagscale.hub import commit_of
from flagscale.patience import patiently
from flagscale.recipe.data import CorpusRecipe
from flagscale.shared.passing import passes

# What changes with a file's content, by the names that fsspec's filesystems have for it.
_SIGNS = (
    *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "blob_id", "sha", "generation"),
    *("VersionId", "Last-Modified", "LastModified", "last_modified", "modified", "updated"),
    *("mtime", "created"),
)
_LOCAL = ("file:", "local:")


def is_remote(corpus: CorpusRecipe) -> bool:
    """Whether it is somewhere else than on this machine."""
    source = corpus.source
    if Path(source).expanduser().exists() or source.startswith(_LOCAL):
        return False
    kind = kind_of_source(corpus)
    return kind == "huggingface" or (kind != "python-docs" and "://" in source)


def remote_state(corpus: CorpusRecipe) -> str | None:
    """A name of what a remote source holds, which changes when that does.

    It is the hub's commit, or made of ETags, times and sizes.

    Args:
        corpus: is remote.

    Returns:
        None where nobody says: the hub cannot be asked, or a server says nothing but a size.

    Raises:
        UserError: there are no such files, or they cannot be listed.
    """
    if kind_of_source(corpus) == "huggingface":
        return commit_of(corpus.source, corpus.revision, "dataset")
    told = [_told(file) for file in list_files(corpus)]
    return f"files {digest(told)[7:23]}" if all(told) else None


def _told(file: File) -> dict[str, Any] | None:
    def ask() -> dict[str, Any]:
        found: dict[str, Any] = file.filesystem.info(file.path)
        return found

    info = patiently(ask, f"ask about {file.path}", passes)
    signs = {name: str(info[name]) for name in _SIGNS if info.get(name)}
    return {"path": file.path, "size": info.get("size"), **signs} if signs else None
