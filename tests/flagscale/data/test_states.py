import os
from pathlib import Path

import fsspec
import huggingface_hub.constants
import pytest
from fsspec.implementations.http import HTTPFileSystem

from flagscale.data.states import is_remote, remote_state
from flagscale.errors import UserError
from flagscale.recipe import DataRecipe
from tests.flagscale.web_server import COMMIT, WebServer


def state(source: str, **options: object) -> str | None:
    corpus = DataRecipe(source=source, **options).corpora[0]
    assert is_remote(corpus)
    return remote_state(corpus)


def test_a_bucket(bucket: str) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        fsspec.filesystem("s3").pipe(f"{bucket}/{name}", b"one")
    sources = [bucket, f"{bucket}/a.jsonl", f"{bucket}/*.jsonl"]
    before = [state(source) for source in sources]
    assert None not in before
    assert before == [state(source) for source in sources]
    fsspec.filesystem("s3").pipe(f"{bucket}/a.jsonl", b"two")  # as long as before
    assert all(a != b for a, b in zip(before, map(state, sources), strict=True))
    with pytest.raises(UserError, match="no such file"):
        state(f"{bucket}/c.jsonl")


def test_a_web_server(web_server: WebServer) -> None:
    HTTPFileSystem.clear_instance_cache()
    file = web_server.folder / "a.jsonl"
    file.write_bytes(b"one")
    url = f"{web_server.url}/a.jsonl"
    before = state(url)
    assert before == state(url)
    file.write_bytes(b"two")
    os.utime(file, (1, 1))
    assert state(url) not in (before, None)
    web_server.tells = False
    assert state(url) is None  # as long as before: nothing else is known


def test_the_hub(hub: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state("o/n") == f"commit {COMMIT}"
    hub.commit = "d" * 40
    assert state("o/n") == f"commit {'d' * 40}"
    assert state("o/n", revision="e" * 40) == f"commit {'e' * 40}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert state("o/n") is None
    # what was fetched last is what will be read
    ref = Path(huggingface_hub.constants.HF_HUB_CACHE) / "datasets--o--n" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("f" * 40)
    assert state("o/n") == f"commit {'f' * 40}"


def test_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for source in ("python-docs", tmp_path, f"file://{tmp_path}/*.txt", tmp_path / "none.txt"):
        assert not is_remote(DataRecipe(source=str(source)).corpora[0])
