"""prepare-data of conversations, alone and blended with text."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_recipe import recipe
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers.processors import TemplateProcessing

from flagscale.artifacts import open_artifact
from flagscale.data.layout import SPLITS
from flagscale.data.loader import split_documents, train_iterator
from flagscale.errors import UserError
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import DataRecipe
from flagscale.steps.prepare_data import prepare_data

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
