"""Which files are whose split: as the `datasets` library says, of folders and of the hub's.

It takes a second to import, so it is only where there is a folder or a data set.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.utils import glob_translate

from flagscale.errors import UserError
from flagscale.recipe.data import CorpusRecipe

CARD = "README.md"
_CONFIGURED = re.compile(r"\s*---\n(?:(?!---).*\n)*?configs:")  # in YAML above the text
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def of_split(corpus: CorpusRecipe, names: Iterable[str]) -> list[str]:
    """The files of a folder that belong to `corpus.split`.

    Args:
        corpus: what is read.
        names: relative to the folder.

    Raises:
        UserError: there is no such split.
    """
    found = by_split([name for name in names if name.rpartition("/")[2] != CARD])
    if corpus.split not in found:
        raise UserError(no_split(corpus, found))
    return found[corpus.split]


def no_split(corpus: CorpusRecipe, found: Iterable[str]) -> str:
    """What is said where a split is not among those there are."""
    return (
        f"data.source={corpus.source!r}: no data.split={corpus.split!r}; there are: "
        f"{', '.join(map(str, found)) or 'none'}. Set data.split, or name the files by a glob"
    )


def by_split(names: list[str]) -> dict[str, list[str]]:
    """Names of files by split, by the library's rules; all are `train` where none says anything."""
    from datasets import data_files as rules

    found: dict[str, list[str]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            found.setdefault(shard[1], []).append(name)
    if found:
        return found
    for patterns in (
        rules.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
        rules.DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    ):
        for split, globs in patterns.items():
            match = re.compile("|".join(map(glob_translate, globs))).match
            if members := [name for name in names if match(name)]:
                found[str(split)] = members
        if found:
            return found
    return {"train": names} if names else {}


class Split(NamedTuple):
    """What a Hugging Face dataset's split is.

    Attributes:
        files: URLs or paths; none where its card says how they are to be read.
        rows: all of them, as the library reads them; may be called several times.
    """

    files: list[str]
    rows: Callable[[], Iterator[dict[str, Any]]]


def load_split(corpus: CorpusRecipe) -> Split:
    """Find the split of a dataset, on the hub or in a folder.

    Raises:
        UserError: there is no such split.
        Exception: whatever hub and library raise.
    """
    import datasets

    path = str(Path(corpus.source).expanduser())
    builder = datasets.load_dataset_builder(path, corpus.subset, revision=corpus.revision)
    config = builder.config
    if corpus.split not in (config.data_files or ()):
        raise UserError(no_split(corpus, config.data_files or ()))

    def rows() -> Iterator[dict[str, Any]]:
        yield from builder.as_streaming_dataset(split=corpus.split)

    usual = type(config)()
    told = {"name", "version", "data_dir", "data_files", "description"}
    is_usual = all(
        getattr(config, field.name) == getattr(usual, field.name)
        for field in dataclasses.fields(config)
        if field.name not in told
    )
    return Split(sorted(set(config.data_files[corpus.split])) if is_usual else [], rows)


def has_configurations(folder: Path) -> bool:
    """Whether a folder's card says of which files its subsets and splits are."""
    card = folder / CARD
    return card.is_file() and _CONFIGURED.match(card.read_text("utf-8", "replace")) is not None
