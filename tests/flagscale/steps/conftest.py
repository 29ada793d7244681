"""Exports are loaded by forks of a warm process; a corpus and a tokenizer for prepare-data."""

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.flagscale.fork_server import ForkServer


@pytest.fixture(scope="module", autouse=True)
def forked_loaders(fork_server: ForkServer) -> Iterator[None]:
    """Of transformers; `models/test_fresh_process.py` has those that find nothing of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flagscale.models.fresh_process.python", lambda: fork_server.python("-I"))
        yield


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
