"""Which files a source is: every name as it stands, nothing hidden, nothing of another split."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.http import HTTPFileSystem

from flagscale.data.sources import detect, documents
from flagscale.errors import UserError
from flagscale.recipe import DataRecipe
from tests.flagscale.web_server import WebServer


def texts(source: object, **options: object) -> list[str]:
    return [d.text for d in documents(DataRecipe(source=str(source), **options).corpora[0])]


def write(path: Path, *found: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "data [final].jsonl",
        "a*.jsonl",
        "what?.jsonl",
        "[0-9].jsonl",
        "ü ö%20#1.jsonl",
        "a{b,c}.jsonl",
        "a::b.jsonl",
        "A.JSONL",
    ],
)
def test_a_name_is_taken_as_it_stands(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a1.jsonl", "not this")
    write(tmp_path / name, "this")
    assert texts(tmp_path / name) == ["this"]
    write(tmp_path / f"{name}.d" / "a.jsonl", "in the folder")
    assert texts(tmp_path / f"{name}.d") == ["in the folder"]


def test_signs_in_a_folder_above_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "run1" / "b.jsonl", "b")
    assert texts(tmp_path / "run[12]" / "*.jsonl") == ["b"]
    with pytest.raises(UserError, match="no such file"):
        texts(tmp_path / "run[34]" / "*.jsonl")


@pytest.mark.parametrize("source", ["corpus.parquet", "corpus.parquet/", "*.parquet"])
def test_what_spark_writes(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "corpus.parquet"
    (folder / "_temporary" / "0").mkdir(parents=True)
    for part, found in enumerate(["one", "two"]):
        file = folder / f"part-0000{part}-5c7d-c000.snappy.parquet"
        pq.write_table(pa.table({"text": [found]}), file)
        (folder / f".{file.name}.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    (folder / "_temporary" / "0" / "part-00002.parquet").write_bytes(b"half")
    assert texts(f"{tmp_path}/{source}") == ["one", "two"]


def test_what_is_hidden(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.jsonl", "a")
    hidden = [".b.jsonl", ".git/b.jsonl", "__MACOSX/b.jsonl", "x/__pycache__/b.jsonl"]
    for name in hidden:
        write(tmp_path / name, "no")
    assert texts(tmp_path) == texts(tmp_path / "*.jsonl") == ["a"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["a"]
    # below a hidden folder that was named nothing is
    assert texts(tmp_path / ".git") == texts(tmp_path / ".git" / "*.jsonl") == ["no"]
    assert texts(tmp_path / hidden[0]) == ["no"]


def test_a_folder_in_the_hubs_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    write(tmp_path / "train.jsonl", *(f"train {i}" for i in range(50)))
    write(tmp_path / "test.jsonl", *(f"test {i}" for i in range(35)))
    assert texts(tmp_path) == [f"train {i}" for i in range(50)]
    assert texts(tmp_path, split="test") == [f"test {i}" for i in range(35)]
    with pytest.raises(UserError, match=r"no data.split='validation'; there are: train, test"):
        texts(tmp_path, split="validation")
    assert f"2 files left out, first {tmp_path}/README.md" in caplog.text
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"no data.split='train'; there are: none"):
        texts(tmp_path)


def test_a_card_that_names_files_decides(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", "x")
    write(tmp_path / "train.jsonl", "no")
    write(tmp_path / "y [1].jsonl", "y")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - {split: train, path: x.jsonl}\n"
        "  - {split: test, path: 'y*.jsonl'}\n- config_name: two\n  data_files: y*.jsonl\n---\n"
    )
    assert detect(str(tmp_path)) == "huggingface"
    assert texts(tmp_path, subset="one") == ["x"]
    assert texts(tmp_path, subset="one", split="test") == texts(tmp_path, subset="two") == ["y"]
    with pytest.raises(UserError, match="Config name is missing"):
        texts(tmp_path)
    with pytest.raises(UserError, match=r"data.subset=three.*BuilderConfig 'three' not found"):
        texts(tmp_path, subset="three")


def test_a_card_that_says_how_to_read_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;n\none, two;1\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n---\n"
    )
    assert texts(tmp_path) == ["one, two"]


@pytest.mark.parametrize(
    ("card", "decides"),
    [
        ("---\nlicense: mit\nconfigs:\n- config_name: a\n---\ntext", True),
        ("---\r\nconfigs:\r\n- config_name: a\r\n---\r\n", True),
        ("# A title\n\n---\nconfigs: 1\n---\n", False),
        ("---\nlicense: mit\n---\n\nconfigs:\n", False),
        ("---\n- no: [ mapping\n---\n", False),
        ("", False),
    ],
)
def test_which_cards_decide(tmp_path: Path, card: str, decides: bool) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    write(tmp_path / "a.jsonl", "a")
    assert (detect(str(tmp_path)) == "huggingface") == decides


@pytest.mark.parametrize("asked", [{"subset": "x"}, {"split": "test"}, {"revision": "main"}])
def test_what_files_do_not_have(tmp_path: Path, asked: dict[str, str]) -> None:
    path = write(tmp_path / "test.jsonl", "a")
    assert texts(path) == ["a"]
    (option, value) = next(iter(asked.items()))
    with pytest.raises(UserError, match=f"names files, which have no data.{option}='{value}'"):
        texts(path, **asked)


def test_a_url_with_a_query(web_server: WebServer) -> None:
    HTTPFileSystem.clear_instance_cache()
    line = b'{"text": "a"}\n'
    (web_server.folder / "a.jsonl").write_bytes(line)
    (web_server.folder / "b.jsonl.gz").write_bytes(gzip.compress(line))
    for name in ("a.jsonl?x[]=1&name=b.txt.gz", "b.jsonl.gz?download=true", "b.jsonl.gz?a=*"):
        assert texts(f"{web_server.url}/{name}") == ["a"]
    with pytest.raises(UserError, match="no such file"):
        texts(f"{web_server.url}/c.jsonl?download=true")
