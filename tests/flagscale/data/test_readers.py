"""Whatever texts are written, in whatever format, are what is read."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data.files import File, list_files
from flagscale.data.readers import STRUCTURED, text
from flagscale.data.rows import Column
from flagscale.recipe import DataRecipe

COLUMN = Column("text", "text_field", lambda values, *_: values)
TEXTS = st.lists(st.text())


def jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))


def table(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="") as stream:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        rows = [["id", "text"], *enumerate(texts)]
        csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)


def parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=2)


def arrow(path: Path, texts: list[str]) -> None:
    found = pa.table({"text": pa.array(texts, pa.string())})
    with pa.ipc.new_stream(path, found.schema) as stream:
        stream.write_table(found, max_chunksize=2)


FORMATS = {"jsonl": jsonl, "csv": table, "tsv": table, "parquet": parquet, "arrow": arrow}


def file_of(path: Path) -> File:
    (file,) = list_files(DataRecipe(source=str(path)).corpora[0])
    return file


@pytest.mark.parametrize(("kind", "write"), FORMATS.items())
def test_rows(
    tmp_path_factory: pytest.TempPathFactory, kind: str, write: Callable[[Path, list[str]], None]
) -> None:
    path = tmp_path_factory.mktemp(kind) / f"a.{kind}"
    path.touch()
    file = file_of(path)

    @settings(max_examples=25)
    @given(TEXTS)
    def check(texts: list[str]) -> None:
        write(path, texts)
        rows = list(STRUCTURED[kind](file, COLUMN))
        assert [row.values["text"] for row in rows] == texts  # type: ignore[index]
        assert len({row.where for row in rows}) == len(rows)

    check()


@settings(max_examples=25)
@given(st.text(), st.integers(1, 50))
def test_passages(tmp_path_factory: pytest.TempPathFactory, content: str, passage: int) -> None:
    """Nothing is lost between them, but for what a line's end is made of."""
    path = tmp_path_factory.getbasetemp() / "passages.txt"
    path.write_bytes(content.encode())
    rows = list(text(file_of(path), COLUMN, passage))
    joined = "".join(row.values["text"] for row in rows)  # type: ignore[index]
    assert joined == re.sub("\r\n?", "\n", content.removeprefix("\ufeff"))
