"""Documents from wherever text is kept, one after the other, never all in memory.

Sources: `python-docs`, files (local, or at any URL that fsspec knows), folders, and Hugging Face
datasets. Rows hold texts, or conversations (`format: chat`). Bad ones are left out, up to a limit.
"""

from __future__ import annotations

import itertools
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from backports import zstd

from flagscale.data.files import File, first_line, is_glob, kind_of, list_files
from flagscale.data.messages import columns, dump_conversation
from flagscale.data.python_docs import python_documents
from flagscale.data.readers import STRUCTURED, text
from flagscale.data.rows import BadRow, BadRows, Column, Row
from flagscale.data.splits import has_configurations, load_split
from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.patience import patiently, resumed
from flagscale.recipe.data import CorpusRecipe
from flagscale.shared.passing import passes

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstd.ZstdError)
_SURROGATES = re.compile("[\ud800-\udfff]")
_PASSAGE = 4_000  # characters of a document cut from a single text file
_LONGEST = 1_000_000  # characters of a document cut from one text file of several


class Document(NamedTuple):
    """A text that stands alone.

    Attributes:
        text: not blank; halves of surrogate pairs are replaced by U+FFFD. Of a conversation, the
            messages as JSON (`flagscale.data.messages`).
        origin: where it comes from, for messages.
    """

    text: str
    origin: str


def documents(corpus: CorpusRecipe, bad_rows: BadRows | None = None) -> Iterator[Document]:
    """Stream the documents of a corpus, blank ones left out, always in the same order.

    Args:
        corpus: what is read.
        bad_rows: counts the rows, and those that are left out.

    Raises:
        UserError: the source is missing, unreadable or malformed, has no such field (naming those
            there are), more bad rows than allowed (naming the first), or no text at all.
    """
    bad_rows = bad_rows or BadRows(corpus.max_bad_rows)
    if corpus.format == "chat":
        column = Column(corpus.messages_field, "messages_field", dump_conversation, columns)
    else:
        column = Column(corpus.text_field, "text_field", _text_of)
    count = 0
    found = _good(_rows(corpus, column), column, bad_rows)
    for document in itertools.islice(found, corpus.max_documents):
        count += 1
        yield document
    if not count:
        why = "the corpus is empty, no text was found"
        if bad_rows.count:
            why = bad_rows.told("and no other holds text")
        raise UserError(f"data.source={corpus.source!r}: {why}")


def _good(rows: Iterator[Row], column: Column, bad_rows: BadRows) -> Iterator[Document]:
    blank = 0
    for row in rows:
        bad_rows.rows += 1
        try:
            found = column.text(row)
        except BadRow as error:
            bad_rows.add(error)
            continue
        if not found or found.isspace():
            blank += 1
        else:
            yield Document(_SURROGATES.sub("\ufffd", found), row.where)
    if blank:
        logger.info("%d blank documents left out", blank)


def detect(source: str) -> str:
    """The format by the source's name: a source, `huggingface`, or `files` of possibly several."""
    if source == "python-docs":
        return source
    path = Path(source).expanduser()
    if path.is_dir():
        return "huggingface" if has_configurations(path) else "files"
    looks_like_files = (
        "://" in source
        or is_glob(source)
        or source.startswith(("/", ".", "~"))
        or source.count("/") > 1
        or kind_of(source) is not None
        or path.exists()
    )
    return "files" if looks_like_files or not _HUB_ID.fullmatch(source) else "huggingface"


def kind_of_source(corpus: CorpusRecipe) -> str:
    """What its recipe says, or else `detect`."""
    return detect(corpus.source) if corpus.format in ("auto", "chat") else corpus.format


def _rows(corpus: CorpusRecipe, column: Column) -> Iterator[Row]:
    kind = kind_of_source(corpus)
    if kind == "huggingface":
        yield from _dataset(corpus, column)
    elif kind != "python-docs":
        for option in ("subset", "revision"):
            if value := getattr(corpus, option):
                raise UserError(
                    f"data.source={corpus.source!r} names files, which have no "
                    f"data.{option}={value!r}"
                )
        given = None if kind == "files" else kind
        yield from _read(list_files(corpus), given, column, passes)
    elif corpus.format == "chat":
        raise UserError("data.source='python-docs' has no conversations; data.format='chat'")
    else:
        for name, content in python_documents():
            yield Row(name, {column.field: content})


def _read(
    files: list[File],
    kind: str | None,
    column: Column,
    passes: Callable[[Exception], bool],
) -> Iterator[Row]:
    """The rows of files, of the given kind or that of their names."""
    passage = _PASSAGE if len(files) == 1 else _LONGEST
    for file in files:
        read = STRUCTURED.get(kind or kind_of(file.path) or "", partial(text, passage=passage))
        with _explained(file.path):
            yield from resumed(partial(read, file, column), f"read {file.path}", passes)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:  # pyarrow's are ValueErrors
        raise UserError(f"{where}: cannot be read: {first_line(error)}") from error


def _dataset(corpus: CorpusRecipe, column: Column) -> Iterator[Row]:
    """Rows of a Hugging Face dataset: its files, where they are of a kind that is read here."""
    source = corpus.source
    try:
        split = patiently(lambda: load_split(corpus), f"open {source}", _is_away)
        if split.files and all(kind_of(path) in STRUCTURED for path in split.files):
            yield from _read(list(map(File.at, split.files)), None, column, is_hub_away)
        else:
            rows = resumed(split.rows, f"read {source}", is_hub_away)
            for number, values in enumerate(rows):
                yield Row(f"{source}: row {number}", values)
    except UserError:
        raise
    except Exception as error:  # hub, network and archives raise their own
        asked = ", ".join(f"data.{n}={getattr(corpus, n)}" for n in ("subset", "split", "revision"))
        also = "no such file, and " if corpus.format in ("auto", "chat") else ""
        raise UserError(
            f"data.source={source!r}: {also}as a Hugging Face dataset ({asked}) it cannot "
            f"be read: {first_line(error)}. Check these fields, the network and HF_TOKEN, or name "
            "a local file or folder"
        ) from error


def _is_away(error: Exception) -> bool:
    """Of the library's errors: it hides that it found nothing because the hub did not answer."""
    return is_hub_away(error) or (error.__context__ is not None and is_hub_away(error.__context__))


def _text_of(values: Mapping[str, Any], field: str, where: str) -> str:
    """The text of a field; null counts as blank."""
    value = values[field]
    if value is not None and not isinstance(value, str):
        found = f"{type(value).__name__} {str(value)[:40]!r}"
        raise BadRow(where, f"field {field!r}: must be text, found {found}")
    return value or ""
