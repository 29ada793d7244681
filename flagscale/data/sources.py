"""Documents from wherever text is kept, one after the other, never all in memory.

Sources: `python-docs`, plain text, JSONL and Parquet files (local, or any URL that fsspec knows;
.gz, .bz2, .xz and .zst are unpacked on the way) and Hugging Face datasets. Rows hold texts, or
conversations (`format: chat`).
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from flagscale.data.files import File, first_line, is_glob, list_files
from flagscale.data.messages import columns, dump_conversation
from flagscale.data.python_docs import python_documents
from flagscale.data.rows import BadRows
from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.patience import resumed
from flagscale.recipe.data import CorpusRecipe
from flagscale.shared.passing import passes

logger = logging.getLogger(__name__)

_SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_SURROGATES = re.compile("[\ud800-\udfff]")
_PASSAGE = 4_000  # characters of a document cut from a single text file
_LONGEST = 1_000_000  # characters of a document cut from one text file of several
_ROWS_A_BATCH = 256


class Document(NamedTuple):
    """A text that stands alone.

    Attributes:
        text: not blank; halves of surrogate pairs are replaced by U+FFFD. Of a conversation, the
            messages as JSON (`flagscale.data.messages`).
        origin: where it comes from, for messages.
    """

    text: str
    origin: str


class _Column(NamedTuple):
    """Where in a row its document is, and how it is read."""

    field: str
    option: str  # of the recipe, which names the field
    is_chat: bool

    def document(self, row: dict[str, Any], where: str) -> Document:
        if not self.among(list(row)):
            raise UserError(self.missing(where, list(row)))
        if self.is_chat:
            return Document(dump_conversation(row, self.field, where), where)
        return Document(_text_of(row[self.field], f"{where}: field {self.field!r}"), where)

    def among(self, names: list[str]) -> list[str]:
        """Those of a row's keys that are read; none where the document is not among them."""
        if self.is_chat:
            return columns(self.field, names)
        return [self.field] if self.field in names else []

    def missing(self, where: str, names: list[str]) -> str:
        there = ", ".join(names)
        return f"{where}: no field {self.field!r}; there are: {there}. Set data.{self.option}"


def documents(corpus: CorpusRecipe, bad_rows: BadRows | None = None) -> Iterator[Document]:
    """Stream the documents of a corpus, blank ones left out, always in the same order.

    Raises:
        UserError: the source is missing, unreadable, malformed (naming file and line), has no such
            field (naming those there are), or holds no text at all.
    """
    is_chat = corpus.format == "chat"
    kind = detect(corpus.source) if corpus.format in ("auto", "chat") else corpus.format
    column = (
        _Column(corpus.messages_field, "messages_field", is_chat)
        if is_chat
        else _Column(corpus.text_field, "text_field", is_chat)
    )
    found: Iterator[Document]
    if kind == "python-docs":
        if is_chat:
            raise UserError("data.source='python-docs' has no conversations; data.format='chat'")
        found = (Document(text, name) for name, text in python_documents())
    elif kind == "huggingface":
        found = _huggingface(corpus, column)
    else:
        found = _files(corpus, kind, column)
    count = 0
    for document in itertools.islice(_presentable(found), corpus.max_documents):
        count += 1
        yield document
    if not count:
        raise UserError(f"data.source={corpus.source!r}: the corpus is empty, no text was found")


def _presentable(found: Iterator[Document]) -> Iterator[Document]:
    blank = 0
    for document in found:
        if not document.text or document.text.isspace():
            blank += 1
        elif _SURROGATES.search(document.text):
            yield document._replace(text=_SURROGATES.sub("\ufffd", document.text))
        else:
            yield document
    if blank:
        logger.info("%d blank documents left out", blank)


def detect(source: str) -> str:
    """The format by the source's name: a source, `huggingface`, or `files` of possibly several."""
    if source == "python-docs":
        return source
    if not source.strip():
        raise UserError(f"data.source={source!r}: must name a source of text")
    path = Path(source).expanduser()
    looks_like_files = (
        "://" in source
        or is_glob(source)
        or source.startswith(("/", ".", "~"))
        or source.count("/") > 1
        or _format_of(source) is not None
        or path.exists()
    )
    return "files" if looks_like_files or not _HUB_ID.fullmatch(source) else "huggingface"


def _format_of(path: str) -> str | None:
    """The format by a path's ending, or a URL's before its query."""
    suffixes = PurePosixPath(path.partition("?")[0]).suffixes
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _files(corpus: CorpusRecipe, kind: str, column: _Column) -> Iterator[Document]:
    files = list_files(corpus.source, is_folder=_format_of(corpus.source) is None)
    if kind == "files":
        known = [e for e in _SUFFIXES if corpus.format != "chat" or _SUFFIXES[e] in _STRUCTURED]
        kinds = {_SUFFIXES[ending] for ending in known}
        chosen = [(file, name) for file in files if (name := _format_of(file.path)) in kinds]
        if not chosen:
            hint = "" if corpus.format == "chat" else "; set data.format"
            raise UserError(
                f"data.source={corpus.source!r}: {len(files)} file(s), first {files[0].path}, none "
                f"with a known ending ({', '.join(known)}){hint}"
            )
        if len(chosen) < len(files):
            logger.info("%d files of other kinds left out", len(files) - len(chosen))
    else:
        chosen = [(file, kind) for file in files]
    longest = _PASSAGE if len(chosen) == 1 else _LONGEST
    for file, name in chosen:
        read = partial(_text, file, longest)
        if name != "text":
            read = partial(_STRUCTURED[name or ""], file, column)
        with _explained(file.path):
            yield from resumed(read, f"read {file.path}", passes)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}); "
            "convert it, or set data.format"
        ) from error
    except _UNREADABLE as error:
        raise UserError(f"{where}: cannot be read: {first_line(error)}") from error
    except (ImportError, ValueError) as error:  # unknown or uninstalled compression
        raise UserError(f"{where}: cannot be opened: {first_line(error)}") from error


def _text(file: File, longest: int) -> Iterator[Document]:
    """A file as one document, or, if longer than `longest` characters, as several.

    It is cut at the first blank line after `longest` characters, at the first line end after twice
    that, or within a line longer than that.
    """
    with file.open() as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
        parts: list[str] = []
        size = number = 0
        while line := stream.readline(longest):
            parts.append(line)
            size += len(line)
            if size >= 2 * longest or (size >= longest and line == "\n"):
                number += 1
                yield Document("".join(parts), f"{file.path}#{number}")
                parts, size = [], 0
        if parts:
            yield Document("".join(parts), f"{file.path}#{number + 1}" if number else file.path)


def _jsonl(file: File, column: _Column) -> Iterator[Document]:
    with file.open() as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at column {error.colno}"
                raise UserError(f"{where}: not valid JSON: {reason}") from None
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: must be an object, found {_kind(row)}")
            yield column.document(row, where)


def _parquet(file: File, column: _Column) -> Iterator[Document]:
    import pyarrow as pa  # half a second, and 50 MB to install: no other format needs it
    import pyarrow.parquet as pq

    try:
        with file.open(compression=None) as stream:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
            wanted = column.among(names)
            if not wanted:
                raise UserError(column.missing(file.path, names))
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS_A_BATCH, columns=wanted):
                for values in batch.to_pylist():
                    row += 1
                    yield column.document(values, f"{file.path}: row {row}")
    except pa.ArrowException as error:
        raise UserError(f"{file.path}: cannot be read: {first_line(error)}") from error


_STRUCTURED: dict[str, Callable[[File, _Column], Iterator[Document]]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
}


def _huggingface(corpus: CorpusRecipe, column: _Column) -> Iterator[Document]:
    import datasets  # takes a second, and no other source needs it

    subset, split, revision = corpus.subset, corpus.split, corpus.revision

    def rows() -> Iterator[dict[str, Any]]:
        yield from datasets.load_dataset(
            corpus.source, subset, split=split, revision=revision, streaming=True
        )

    try:
        for number, row in enumerate(resumed(rows, f"read {corpus.source}", is_hub_away)):
            yield column.document(row, f"{corpus.source}: row {number}")
    except UserError:
        raise
    except Exception as error:  # hub, network and archives raise their own
        asked = f"data.subset={subset}, data.split={split}, data.revision={revision}"
        also = "no such file, and " if corpus.format in ("auto", "chat") else ""
        raise UserError(
            f"data.source={corpus.source!r}: {also}as a Hugging Face dataset ({asked}) it cannot "
            f"be read: {first_line(error)}. Check these fields, the network and HF_TOKEN, or name "
            "a local file or folder"
        ) from error


def _text_of(value: object, where: str) -> str:
    """The text of a field; null counts as blank."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where} must be text, found {_kind(value)}")
    return value or ""


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
