"""Documents of files and folders, in every format; what cannot be read is named."""

import bz2
import csv
import gzip
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from source_texts import texts, write_jsonl

from flagscale.data.messages import dump_conversation, load_conversation
from flagscale.data.rows import BadRows
from flagscale.data.sources import documents
from flagscale.errors import UserError
from flagscale.recipe import DataRecipe


def test_python_docs() -> None:
    found = texts("python-docs", max_documents=4)
    assert len(found) == 4
    assert found == texts("ignored", format="python-docs", max_documents=4)


def test_files_of_a_folder_are_a_document_each(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second " * 2000)
    (tmp_path / "a.md").write_bytes("\ufeffféte\r\nline".encode())
    (tmp_path / "c").mkdir()
    write_jsonl(tmp_path / "c" / "c.jsonl", {"text": "third"}, {"text": "fourth"})
    (tmp_path / "logo.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "no.txt").write_text("no")
    assert texts(tmp_path) == ["féte\nline", "second " * 2000, "third", "fourth"]
    assert texts(f"{tmp_path}/") == texts(tmp_path)


def test_a_single_file_becomes_passages(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}. " + "word " * 100 + "\n\n" for i in range(60)]
    path.write_text("".join(paragraphs))
    found = texts(path)
    assert "".join(found) == "".join(paragraphs)
    assert len(found) > 5
    assert all(text.startswith("Paragraph") and len(text) < 5000 for text in found)


def test_a_long_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("x" * 50_000)
    assert "".join(texts(path)) == "x" * 50_000
    assert max(map(len, texts(path))) <= 12_000


def test_glob(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert texts(tmp_path / "[ac].*") == ["a.txt", "c.md"]


def test_unknown_ending_with_a_given_format(tmp_path: Path) -> None:
    (tmp_path / "data.log").write_text("some text")
    assert texts(tmp_path / "data.log", format="text") == ["some text"]
    with pytest.raises(UserError, match=r"none with a known ending \(.txt.*set data.format"):
        texts(tmp_path / "data.log")


@pytest.mark.parametrize(
    ("ending", "compress", "refusal"),
    [
        ("gz", gzip.compress, "BadGzipFile"),
        ("bz2", bz2.compress, "OSError: Invalid data stream"),
        ("xz", lzma.compress, "LZMAError"),
        ("zst", zstd.compress, "ZstdError"),
    ],
)
def test_compressed(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], refusal: str
) -> None:
    """In several pieces, as `cat` makes them; half a file is not taken for the whole."""
    path = tmp_path / f"data.jsonl.{ending}"
    pieces = [b'{"text": "packed"}\n\n', b'{"text": "twice"}']
    path.write_bytes(b"".join(map(compress, pieces)))
    assert texts(path) == ["packed", "twice"]
    assert texts(path, format="text") == [b"".join(pieces).decode()]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cannot be read: (EOFError|ZstdError)"):
        texts(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match=f"data.jsonl.{ending}: cannot be read: {refusal}"):
        texts(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [f"row {i}" for i in range(1000)]
    pq.write_table(pa.table({"id": range(1000), "body": rows}), path, row_group_size=100)
    assert texts(path, text_field="body") == rows
    with pytest.raises(UserError, match=r"no field 'text'; there are: id, body. Set data.text_f"):
        texts(path)
    with pytest.raises(UserError, match=r"row 1: field 'id': must be text, found int '0'"):
        texts(path, text_field="id")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"rows.parquet: cannot be read: ArrowInvalid"):
        texts(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"body": "x", "id": 1}', "no field 'text'; there are: body, id. Set data.text_field"),
        (b'{"text": "no', "not valid JSON: Unterminated string starting at at column 10"),
        (b'["text"]', "must be an object, found list \"['text']\""),
        (b'{"text": 7}', "field 'text': must be text, found int '7'"),
        (b'{"text": "\xff"}', "not UTF-8 text; convert it, or set data.format"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON: it is nested too deeply"),
        (b'{"x": ' + b"1" * 5000 + b"}", "not readable JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named_and_left_out(
    tmp_path: Path, line: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    bad_rows = BadRows()
    found = documents(DataRecipe(source=str(path)).corpora[0], bad_rows)
    assert next(found).text == "one"  # nothing further has been read
    assert [document.text for document in found] == ["two"]
    (told,) = bad_rows.facts()["first_bad_rows"]
    assert told.startswith(f"{path}:3: ")
    assert reason in told
    assert f"left out: {told}" in caplog.text
    assert (bad_rows.count, bad_rows.rows) == (1, 3)
    with pytest.raises(UserError, match=r"(?s)1 of 2 rows so far .*more than 0 .*a.jsonl:3: "):
        texts(path, max_bad_rows=0)
    path.write_bytes(line)
    with pytest.raises(UserError, match=r"(?s)1 of 1 rows .*no other holds text.*a.jsonl:1: "):
        texts(path)


def test_blank_documents_and_half_characters(tmp_path: Path) -> None:
    rows = [{"text": t} for t in ("", "  \n", None, "a\ud83d b", "c")]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    assert texts(path) == ["a\ufffd b", "c"]
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\r\n{"text": "second"}')
    assert texts(path) == ["first", "second"]


def test_max_documents(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(9)))
    assert texts(path, max_documents=4) == ["0", "1", "2", "3"]


def test_a_passage_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"(?s)a.txt: not UTF-8 text \(byte 0xe9\); convert it"):
        texts(path)
    path.write_bytes(b"good\n" * 1000 + b"\n" + b"caf\xe9\n" * 1000 + b"\n" + b"fine\n" * 1000)
    assert texts(path) == ["good\n" * 1000 + "\n", "fine\n" * 1000]
    (tmp_path / "b.txt").write_text("whole")
    assert texts(tmp_path) == ["whole"]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = ["NA", "007", "2020-01-01", 'she said, "no"\n\nand left', "", "x" * 200_000, "é"]
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows([["id", "text"], *([i, row] for i, row in enumerate(rows))])
    assert texts(path) == [row for row in rows if row]
    with pytest.raises(UserError, match=r"a.csv: no field 'body'; there are: id, text. Set data.t"):
        texts(path, text_field="body")
    path.rename(tmp_path / "a.tsv")
    (tmp_path / "a.tsv").write_text('text\tn\none, two\t1\n\n"three\tfour"\t2\nfive\n')
    assert texts(tmp_path / "a.tsv") == ["one, two", "three\tfour"]
    with pytest.raises(UserError, match=r"a.tsv:5: 1 values for 2 columns"):
        texts(tmp_path / "a.tsv", max_bad_rows=0)
    path.write_bytes(b"text,n\ncaf\xe9,1\ngood,2\n")
    assert texts(path) == ["good"]
    path.write_text('text,n\n"a quote" too many",1\ngood,2\n')
    with pytest.raises(UserError, match=r"a.csv:2: not valid CSV: ',' expected after '\"'"):
        texts(path)


def test_arrow(tmp_path: Path) -> None:
    """As the datasets library saves it, and as Arrow's own files."""
    table = pa.table({"id": [1, 2, 3], "text": ["one", None, "three"]})
    datasets.DatasetDict(
        {"train": datasets.Dataset(table), "test": datasets.Dataset(table.slice(0, 1))}
    ).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["one", "three"]
    assert texts(tmp_path / "saved", split="test") == ["one"]
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    assert texts(tmp_path / "a.arrow") == ["one", "three"]
    with pytest.raises(UserError, match=r"no field 'body'; there are: id, text. Set data.text_f"):
        texts(tmp_path / "a.arrow", text_field="body")
    (tmp_path / "a.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"a.arrow: cannot be read: ArrowInvalid"):
        texts(tmp_path / "a.arrow")


def test_a_cell_of_a_column_that_is_not_utf8(tmp_path: Path) -> None:
    cells = pa.array([b"one", b"\xff", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "three"]
    with pytest.raises(UserError, match=r"a.parquet: row 2: not UTF-8"):
        texts(tmp_path / "a.parquet", max_bad_rows=0)


@pytest.mark.parametrize("source", ["/no/such/file.txt", "gone.jsonl", "./nowhere", "/no/*.txt"])
def test_missing(source: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        texts(source)


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path)  # permissions do not stop root
    with pytest.raises(UserError, match=r"a.txt: cannot be read: IsADirectoryError"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_corpus(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match="the corpus is empty"):
        texts(tmp_path / "a.txt")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no files there"):
        texts(tmp_path)


def test_streams(tmp_path: Path) -> None:
    """The first documents of a file come without the rest of it."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as stream:
        for i in range(20_000):
            stream.write(json.dumps({"text": str(i)}) + "\n")
        stream.write("broken")
    first = itertools.islice(documents(DataRecipe(source=str(path)).corpora[0]), 20_000)
    assert sum(1 for _ in first) == 20_000


def talks(source: object, **options: object) -> list[str]:
    return texts(source, format="chat", **options)


def test_conversations(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"hé {i}"}] for i in range(3)]
    rows = [{"messages": turn, "id": 1} for turn in turns]
    path = write_jsonl(tmp_path / "a.jsonl", *rows, {"messages": None}, {"messages": []})
    wanted = [dump_conversation({"messages": turn}, "messages", "") for turn in turns]
    assert talks(path) == wanted
    assert talks(tmp_path) == wanted
    # a column of structs has every key in every row
    answer = {"role": "assistant", "content": "", "name": "x"}
    full = [[{**turn[0], "name": None}, answer] for turn in turns]
    tools = [[{"name": "f"}], None, []]
    pq.write_table(pa.table({"chat": full, "tools": tools}), tmp_path / "b.parquet")
    (found, other, _) = talks(tmp_path / "b.parquet", messages_field="chat")
    assert load_conversation(found).messages == [turns[0][0], answer]
    assert load_conversation(found).tools == [{"name": "f"}]
    assert load_conversation(other).tools is None
    datasets.Dataset.from_dict({"messages": turns}).to_parquet(tmp_path / "hub" / "c.parquet")
    assert talks(tmp_path / "hub") == wanted


def test_what_a_call_was_given_comes_back_from_a_column_of_json(tmp_path: Path) -> None:
    """Objects of different keys, which the datasets library writes as text."""
    answer = {"role": "assistant", "content": "", "args": {"x": 1}}
    features = datasets.Features(
        {
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.Value("string"),
                    "args": datasets.Json(),
                }
            )
        }
    )
    rows = {"messages": [[answer], [{**answer, "args": [1, "z"]}]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    found = [load_conversation(talk).messages[0]["args"] for talk in talks(tmp_path)]
    assert found == [{"x": 1}, [1, "z"]]


def test_where_there_are_no_conversations(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"messages": "hello"})
    with pytest.raises(UserError, match=r"a.jsonl:1: no field 'messages'; .* Set data.messages_fi"):
        talks(path)
    with pytest.raises(UserError, match=r"a.jsonl:1: field 'text' is text, but no JSON: str 'a'"):
        talks(path, messages_field="text")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.txt").write_text("hello")
    with pytest.raises(UserError, match=r"known ending \(.jsonl, .ndjson, .parquet, .*w\)$"):
        talks(tmp_path / "b")
    with pytest.raises(UserError, match="python-docs' has no conversations"):
        talks("python-docs")
