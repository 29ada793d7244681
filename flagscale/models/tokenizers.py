"""The tokenizer that belongs to a model."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flagscale.artifacts import digest
from flagscale.errors import UserError
from flagscale.imports import uncollected
from flagscale.models.location import locate, read


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer that belongs to a model.

    Args:
        source: see `locate`.
        revision: see there.

    Raises:
        UserError: there is none, it cannot be read, or it is not a fast tokenizer.
    """
    place = locate(source, revision)
    with uncollected():  # transformers imports most of itself only now
        tokenizer = read(AutoTokenizer, source, "tokenizer", place)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer of {source}: {type(tokenizer).__name__} is not supported; "
            "a fast tokenizer (tokenizer.json) is needed"
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identity of what a tokenizer does: vocabulary, merges, pre-processing and special tokens.

    Unlike a hash of its files it does not change with the place it was loaded from.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for transient in ("truncation", "padding", "version"):
        pipeline.pop(transient, None)
    return digest({"pipeline": pipeline, "special": tokenizer.special_tokens_map})
