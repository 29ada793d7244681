"""prepare-data: what it makes of text, what it tells, and what is left where it fails."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_recipe import recipe
from tokenizers.processors import TemplateProcessing

from flagscale.artifacts import open_artifact
from flagscale.data.counts import Counts
from flagscale.data.layout import SPLITS
from flagscale.data.loader import split_documents, train_iterator
from flagscale.data.writer import Corpus
from flagscale.errors import UserError
from flagscale.models.tokenizers import load_tokenizer, tokenizer_hash
from flagscale.recipe import DataRecipe
from flagscale.steps import prepare_data as step
from flagscale.steps.prepare_data import prepare_data
from tests.flagscale.web_server import WebServer

CODE = """
import sys
from pathlib import Path
from flagscale.recipe import DataRecipe
from flagscale.steps.prepare_data import prepare_data
prepare_data(DataRecipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


def test_dataset(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "dataset"
    metrics = prepare_data(recipe(tokenizer, corpus), output)
    manifest = open_artifact(output, "dataset")
    facts = manifest.facts
    assert facts["eod_id"] == 0
    assert facts["vocab_size"] == 400
    assert facts["seq_length"] == 32
    assert sum(split["documents"] for split in facts["splits"].values()) == 201
    assert facts["duplicate_documents"] == metrics["duplicate_documents"] == 1
    assert manifest.tokenizer_hash == tokenizer_hash(load_tokenizer(output / "tokenizer"))
    assert manifest.recipe["data"]["source"] == str(corpus)
    for name, split in facts["splits"].items():
        documents = split_documents(output, name)
        assert len(documents) == split["documents"] == metrics[f"{name}_documents"]
        assert sum(map(len, documents)) == split["tokens"] == metrics[f"{name}_tokens"]
        assert metrics[f"{name}_sequences"] == (split["tokens"] - 1) // 32 > 0
    assert all(isinstance(value, float) for value in metrics.values())
    batches = train_iterator(
        output, tmp_path / "cache", micro_batch_size=2, global_batch_size=2, seed=0
    )
    assert next(batches)["tokens"].shape == (2, 32)


def test_documents_of_a_model_with_bos(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    """As its tokenizer begins texts; a pad token that no text holds is not among what is held."""
    fast = load_tokenizer(tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 400)]
    )
    fast.save_pretrained(tmp_path / "with-bos")
    output = tmp_path / "dataset"
    prepare_data(recipe(tmp_path / "with-bos", corpus), output)
    facts = open_artifact(output, "dataset").facts
    assert (facts["bos_id"], facts["eod_id"]) == (400, 0)
    assert (facts["highest_id"], facts["vocab_size"]) == (400, 402)
    for name in SPLITS:
        for document in split_documents(output, name):
            assert document[0] == 400
            assert document[-1] == 0
    without = recipe(tmp_path / "with-bos", corpus, bos_token=None)
    prepare_data(without, tmp_path / "without")
    facts = open_artifact(tmp_path / "without", "dataset").facts
    assert facts["bos_id"] is None
    assert facts["highest_id"] < 400


def test_bad_rows_are_told(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:9], "no", *lines[9:], "[]"]))
    output = tmp_path / "dataset"
    metrics = prepare_data(recipe(tokenizer, corpus), output)
    assert metrics["bad_rows"] == 2
    (facts,) = open_artifact(output, "dataset").facts["corpora"]
    assert facts["bad_rows"] == 2
    assert [row.split(": ")[0] for row in facts["first_bad_rows"]] == [
        f"{corpus}:10",
        f"{corpus}:{len(lines) + 2}",
    ]
    with pytest.raises(UserError, match=r"(?s)2 of 20. rows so far .* more than 1 .*:10: not"):
        prepare_data(recipe(tokenizer, corpus, max_bad_rows=1), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_dataset_says_what_state_of_remote_text_it_was_made_of(
    tokenizer: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = WebServer(tmp_path)
    url = f"{server.url}/{corpus.name}"
    prepare_data(recipe(tokenizer, url), tmp_path / "one")
    (facts,) = open_artifact(tmp_path / "one", "dataset").facts["corpora"]
    assert facts["state"].startswith("files ")
    assert f"{url}: read as it is now ({facts['state']}). KFP's cache knows it by" in caplog.text
    caplog.clear()
    prepare_data(recipe(tokenizer, url, fingerprint="known"), tmp_path / "two")
    assert "KFP's cache" not in caplog.text
    server.close()


def test_the_same_again(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        prepare_data(recipe(tokenizer, corpus), tmp_path / name)
        digests.add(open_artifact(tmp_path / name, "dataset").digest)
    assert len(digests) == 1


def test_python_docs(tokenizer: Path, tmp_path: Path) -> None:
    data = DataRecipe(tokenizer=str(tokenizer), max_documents=100, seq_length=64)
    metrics = prepare_data(data, tmp_path / "dataset")
    assert metrics["train_documents"] > 80
    assert metrics["test_sequences"] > 0


def test_what_the_user_can_put_right(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "dataset"
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "A single line."}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    cases = [
        (recipe(tokenizer, few), "split has .* but one sequence of data.seq_length=32 needs 33"),
        (recipe(tokenizer, corpus, seq_length=10_000), "needs 10001; the whole corpus has 201"),
        (recipe(tokenizer, empty), "the corpus is empty"),
        (recipe(tokenizer, tmp_path / "gone.jsonl"), "no such file"),
        (recipe(tokenizer, corpus, text_field="body"), "no field 'body'; there are: text"),
        (recipe(tokenizer, corpus, eod_token="<eod>"), "data.eod_token='<eod>': not in"),
        (recipe(tmp_path / "nothing", corpus), "nothing: no such folder"),
        (DataRecipe(source=str(corpus)), "data.tokenizer is not set"),
    ]
    for data, message in cases:
        with pytest.raises(UserError, match=message):
            prepare_data(data, output)
        assert not output.exists()
        assert not list(tmp_path.glob(".dataset*"))


def test_a_failure_leaves_the_last_result(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "dataset"
    prepare_data(recipe(tokenizer, corpus), output)
    before = open_artifact(output, "dataset")
    with pytest.raises(UserError):
        prepare_data(recipe(tokenizer, corpus, seq_length=10_000), output)
    assert open_artifact(output, "dataset") == before


def test_full_disk(
    tokenizer: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own ENOSPC, met while tokens are written."""
    real = step.write_splits

    def onto_a_full_disk(
        corpora: Sequence[Corpus], folder: Path, workers: int | None
    ) -> list[Counts]:
        (folder / "train.bin").symlink_to("/dev/full")
        return real(corpora, folder, workers)

    monkeypatch.setattr(step, "write_splits", onto_a_full_disk)
    with pytest.raises(UserError, match=r"no space left on the disk of .*MiB free\); free some"):
        prepare_data(recipe(tokenizer, corpus), tmp_path / "dataset")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_killed(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    """Kill -9 in the middle: no artifact is there, and the next run makes it."""
    large, output = tmp_path / "large.jsonl", tmp_path / "dataset"
    large.write_text((json.dumps({"text": "Some words. " * 100}) + "\n") * 20_000)
    arguments = [recipe(tokenizer, large).model_dump_json(), str(output)]
    process = subprocess.Popen([sys.executable, "-c", CODE, *arguments], stderr=subprocess.DEVNULL)
    partial = tmp_path / ".dataset.partial"
    while not any(path.stat().st_size for path in partial.glob("*.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert partial.exists()
    assert not output.exists()
    with pytest.raises(UserError, match="no dataset here"):
        open_artifact(output, "dataset")
    prepare_data(recipe(tokenizer, corpus), output)
    assert open_artifact(output, "dataset").facts["splits"]
    assert not partial.exists()


def test_rate_is_measured(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    metrics = prepare_data(recipe(tokenizer, corpus), tmp_path / "dataset")
    tokens = sum(metrics[f"{name}_tokens"] for name in ("train", "validation", "test"))
    assert metrics["tokens_per_second"] > tokens / (time.monotonic() - start)
