"""Text that lies elsewhere: in a bucket, on the Hub, on a web server that is away at times."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.http import HTTPFileSystem
from source_texts import texts, write_jsonl

from flagscale.errors import UserError
from tests.flagscale.web_server import COMMIT, HALF, HANGS_UP, WebServer


@pytest.fixture
def bucket() -> Iterator[str]:
    """A real fsspec filesystem that is not the local disk."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", b'{"text": "one"}\n')
    memory.pipe("/bucket/b.txt", b"two")
    table = pa.table({"text": ["three", None, "four"]})
    with memory.open("/bucket/c.parquet", "wb") as stream:
        pq.write_table(table, stream)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def test_url(bucket: str) -> None:
    assert texts(f"{bucket}/a.jsonl") == ["one"]
    assert texts(bucket) == ["one", "two", "three", "four"]
    assert texts(f"{bucket}/*.parquet") == ["three", "four"]
    with pytest.raises(UserError, match="no such file"):
        texts(f"{bucket}/missing.jsonl")


def test_unknown_protocol() -> None:
    with pytest.raises(
        UserError, match=r"data.source='nosuch://x/a.txt' cannot be opened: .*nosuch"
    ):
        texts("nosuch://x/a.txt")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("no_hub")
def test_huggingface_dataset(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", *({"text": f"t{i}", "n": i} for i in range(50)))
    options = {"format": "huggingface"}
    assert texts(tmp_path, **options) == [f"t{i}" for i in range(50)]
    assert texts(tmp_path, max_documents=4, **options) == ["t0", "t1", "t2", "t3"]
    with pytest.raises(UserError, match=r"train.jsonl:1: no field 'body'; there are: text, n"):
        texts(tmp_path, text_field="body", **options)
    with pytest.raises(UserError, match=r"no data.split='dev'; there are: train. Set"):
        texts(tmp_path, split="dev", **options)


@pytest.mark.usefixtures("no_hub")
def test_huggingface_out_of_reach() -> None:
    with pytest.raises(UserError, match=r"'some/dataset': no such file, and as a Hugging Face"):
        texts("some/dataset")


def test_a_dataset_on_the_hub(hub: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    """Its splits are the library's; what looks like a time stays text, a bad row has its place."""
    days = [f"2020-01-0{i}" for i in range(1, 10)]
    (hub.folder / "README.md").write_text("# A dataset")
    train = write_jsonl(hub.folder / "train.jsonl", *({"text": day} for day in days))
    train.write_text(train.read_text() + "no\n")
    write_jsonl(hub.folder / "test.jsonl", {"text": "held out"})
    assert texts("o/n") == days
    assert texts("o/n", split="test") == ["held out"]
    assert f"left out: datasets/o/n@{COMMIT}/train.jsonl:10: not valid JSON" in caplog.text
    huggingface_hub.HfFileSystem.clear_instance_cache()
    (hub.folder / "test.jsonl").unlink()
    (hub.folder / "test.csv.gz").write_bytes(gzip.compress(b"text,n\nNA,1\n007,2\n"))
    train.rename(hub.folder / "train.csv").write_text("text\nunused\n")
    assert texts("o/n", split="test") == ["NA", "007"]
    (hub.folder / "test.csv.gz").unlink()
    (hub.folder / "train.csv").rename(hub.folder / "train.json").write_text(
        "no\n"
    )  # lines or one array: the library finds out
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"as a Hugging Face dataset .* it cannot be read: Arrow"):
        texts("o/n")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    (hub.folder / "train.json").write_text(json.dumps([{"text": day} for day in "abc"]))
    assert texts("o/n") == ["a", "b", "c"]


@pytest.mark.usefixtures("in_a_pod")
def test_a_hub_that_is_away_for_a_while(hub: WebServer) -> None:
    write_jsonl(hub.folder / "train.jsonl", *({"text": f"{i}" * 100} for i in range(99)))
    expected = texts("o/n")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    hub.troubles = [HANGS_UP, 503, 429, 500] * 6
    assert texts("o/n") == expected


@pytest.fixture
def served(web_server: WebServer) -> str:
    """URL of a folder with two files, which no client has asked for yet."""
    write_jsonl(web_server.folder / "a.jsonl", *({"text": f"a{i}" * 100} for i in range(99)))
    write_jsonl(web_server.folder / "b.jsonl", {"text": "b"})
    HTTPFileSystem.clear_instance_cache()
    return web_server.url


@pytest.mark.usefixtures("in_a_pod")
@pytest.mark.parametrize("name", ["a.jsonl", "*.jsonl"])
@pytest.mark.parametrize("first", range(5))
def test_remote_text_outlasts_a_server_that_is_away(
    web_server: WebServer, served: str, name: str, first: int
) -> None:
    """Whatever it is asked for just then; half a file is not taken for the whole."""
    expected = texts(f"{served}/{name}")
    HTTPFileSystem.clear_instance_cache()
    web_server.troubles = [200] * first + [503, 503, HANGS_UP, 503, HALF, 429, HALF]
    assert texts(f"{served}/{name}") == expected
    assert len(expected) == (99 if name == "a.jsonl" else 100)


@pytest.mark.usefixtures("in_a_pod")
@pytest.mark.parametrize("status", [401, 403, 404])
def test_remote_text_that_is_refused(web_server: WebServer, served: str, status: int) -> None:
    web_server.troubles = [status] * 100
    with pytest.raises(UserError, match="no such file" if status == 404 else str(status)):
        texts(f"{served}/a.jsonl")
    assert len(web_server.requests) <= 2


def test_a_server_that_is_away_is_told_at_once_to_people(
    web_server: WebServer, served: str
) -> None:
    web_server.troubles = [503] * 100
    with pytest.raises(UserError, match=r"a.jsonl' cannot be opened: ClientResponseError: 503"):
        texts(f"{served}/a.jsonl")
    assert len(web_server.requests) <= 2
