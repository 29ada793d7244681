import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([topics["for"]], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"Number {i}. " + "Some words. " * (i % 11)} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1]]))
    return path


def recipe(tokenizer: Path, source: Path, **changes: object) -> DataRecipe:
    values = {"tokenizer": str(tokenizer), "source": str(source), "seq_length": 32}
    return DataRecipe.model_validate({**values, **changes})


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


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    fast = load_tokenizer(tokenizer)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    chats = [
        [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": f"It is {i}. " * (40 if i % 50 == 49 else 1)},
        ]
        for i in range(100)
    ]
    rows = [{"messages": chat} for chat in [*chats, chats[0], chats[0][:1]]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_template_that_writes_bos(tokenizer: Path, talks: Path, tmp_path: Path) -> None:
    """The tokenizer would put one more in front; a conversation has the template's alone."""
    fast = load_tokenizer(tokenizer)
    fast.add_special_tokens({"bos_token": "<s>"})
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 400)]
    )
    fast.chat_template = "{{ bos_token }}" + TEMPLATE
    fast.save_pretrained(tmp_path / "with-bos")
    prepare_data(recipe(tmp_path / "with-bos", talks, format="chat"), tmp_path / "dataset")
    for name in SPLITS:
        for document in split_documents(tmp_path / "dataset", name):
            assert np.flatnonzero(document == 400).tolist() == [0]


def test_conversations(
    chat_tokenizer: Path, talks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "dataset"
    with caplog.at_level("WARNING"):
        metrics = prepare_data(recipe(chat_tokenizer, talks, format="chat"), output)
    assert metrics["conversations_left_out"] == metrics["duplicate_documents"] == 1
    assert sum(metrics[f"{name}_documents"] for name in SPLITS) == 101
    assert sum(metrics[f"{name}_truncated"] for name in SPLITS) == 2
    assert metrics["conversations_lost_answers"] == 2
    assert "2 answers lose their end, or all, beyond 33 tokens (620 tokens that" in caplog.text
    assert "1 conversations without an answer that is learnt left out" in caplog.text
    manifest = open_artifact(output, "dataset")
    assert manifest.facts["corpora"][0]["kind"] == "chat"
    assert {f"{name}.mask.bin" for name in SPLITS} < set(manifest.files)
    words = load_tokenizer(output / "tokenizer").convert_ids_to_tokens
    for name in SPLITS:
        documents, masks = (
            [np.array(indexed[i]) for i in range(len(indexed))]
            for indexed in map(IndexedDataset, (f"{output}/{name}", f"{output}/{name}.mask"))
        )
        assert [len(document) for document in documents] == [len(mask) for mask in masks]
        assert sum(map(np.sum, masks)) == metrics[f"{name}_learnt_tokens"]
        for document, mask in zip(documents, masks, strict=True):
            assert "".join(words(document[mask == 1])).startswith("ItĠis")
            assert "".join(words(document)).startswith("user:ĠWhatĠis")
    batch = next(
        train_iterator(output, tmp_path / "cache", micro_batch_size=2, global_batch_size=2, seed=0)
    )
    assert 0 < batch["loss_mask"].mean() < 1


def test_conversations_that_are_all_too_long(chat_tokenizer: Path, tmp_path: Path) -> None:
    talks = tmp_path / "talks.jsonl"
    chat = [{"role": "user", "content": "Why? " * 40}, {"role": "assistant", "content": "So."}]
    rows = [{"messages": [*chat, *chat][: 2 + 2 * (i % 2)]} for i in range(42)]
    talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = recipe(chat_tokenizer, talks, format="chat")
    with pytest.raises(
        UserError, match=r"train split.* 42 conversations were left out.* data.seq_length=32 takes"
    ) as refused:
        prepare_data(data, tmp_path / "dataset")
    some, every = map(int, re.findall(r"with (\d+) ", str(refused.value)))
    assert 32 < some < every


def test_a_template_of_ones_own(tokenizer: Path, talks: Path, tmp_path: Path) -> None:
    """From a file, with a variable; it lies in the artifact, whence the student gets it."""
    template = tmp_path / "chat_template.jinja"
    template.write_text(
        "{{ greeting }}" + TEMPLATE.replace("{{ message.role", "as {{ message.role")
    )
    data = recipe(
        tokenizer,
        talks,
        format="chat",
        chat_template=str(template),
        chat_template_kwargs={"greeting": "Hello!\n"},
        seq_length=64,
    )
    assert data.chat_template == template.read_text()
    assert DataRecipe.model_validate(data.model_dump(mode="json")) == data
    template.unlink()  # the steps may run elsewhere
    output = tmp_path / "dataset"
    prepare_data(data, output)
    stored = load_tokenizer(output / "tokenizer")
    assert stored.chat_template == data.chat_template
    words = stored.convert_ids_to_tokens(split_documents(output, "test")[0])
    assert "".join(words).startswith("Hello!ĊasĠuser:ĠWhatĠis")


def blend(tokenizer: Path, *corpora: dict[str, object], **changes: object) -> DataRecipe:
    values = {"tokenizer": str(tokenizer), "seq_length": 32, "blend": list(corpora)}
    return DataRecipe.model_validate({**values, **changes})


def test_blend(chat_tokenizer: Path, corpus: Path, talks: Path, tmp_path: Path) -> None:
    """Each corpus' training split is what it would be alone; held-out documents are together."""
    data = blend(
        chat_tokenizer,
        {"name": "notes", "source": str(corpus), "weight": 3, "max_documents": 150},
        {"name": "talks", "source": str(talks), "format": "chat"},
        {"name": "again", "source": str(corpus), "weight": 0.5},
    )
    metrics = prepare_data(data, tmp_path / "together")
    prepare_data(recipe(chat_tokenizer, talks, format="chat"), tmp_path / "talks")
    prepare_data(recipe(chat_tokenizer, corpus), tmp_path / "again")
    facts = open_artifact(tmp_path / "together", "dataset").facts
    assert [c["weight"] for c in facts["corpora"]] == [3, 1, 0.5]
    assert [c["duplicates"] for c in facts["corpora"]] == [0, 1, 151]
    for name in ("talks", "again"):
        for ending in (".bin", ".idx", *((".mask.bin", ".mask.idx") if name == "talks" else ())):
            alone = (tmp_path / name / f"train{ending}").read_bytes()
            assert (tmp_path / "together" / f"train-{name}{ending}").read_bytes() == alone
    for split in SPLITS:
        counts = [corpus["splits"][split] for corpus in facts["corpora"]]
        documents = split_documents(tmp_path / "together", split)
        assert len(documents) == sum(count["documents"] for count in counts)
        assert metrics[f"{split}_documents"] == len(documents)
        alone = split_documents(tmp_path / "again", split)
        together = documents[-len(alone) :]
        assert all(map(np.array_equal, together, alone))
    batches = train_iterator(
        tmp_path / "together", tmp_path / "cache", micro_batch_size=1, global_batch_size=9, seed=0
    )
    masked = [bool((batch["loss_mask"] == 0).any()) for batch in itertools.islice(batches, 90)]
    assert sum(masked) == 20  # 1 of 4.5


def test_what_can_be_put_right_in_a_blend(
    tokenizer: Path, chat_tokenizer: Path, corpus: Path, tmp_path: Path
) -> None:
    good = {"name": "good", "source": str(corpus)}
    empty, short = tmp_path / "empty.jsonl", tmp_path / "short.jsonl"
    empty.write_text("")
    short.write_text('{"text": "A single line."}\n')
    cases = [
        (blend(tokenizer, good, {"name": "none", "source": str(empty)}), "corpus 'none': .* empty"),
        (
            blend(tokenizer, good, {"name": "short", "source": str(short)}),
            "the train split of 'short' has 1 documents .* the whole corpus has 1 documents",
        ),
        (
            blend(tokenizer, good, {"name": "chat", "source": str(tmp_path), "format": "chat"}),
            "data.format='chat': the tokenizer has no chat_template",
        ),
        (
            blend(chat_tokenizer, good, {"name": "c", "source": str(corpus), "format": "chat"}),
            "(?s)corpus 'c': .*corpus.jsonl:1: no field 'messages'; there are: text",
        ),
    ]
    for data, message in cases:
        with pytest.raises(UserError, match=message):
            prepare_data(data, tmp_path / "dataset")
        assert not (tmp_path / "dataset").exists()


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
