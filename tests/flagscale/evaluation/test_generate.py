"""Greedy continuations equal transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flagscale.evaluation.generate import continuations


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def by_transformers(model: LlamaForCausalLM, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [1, 2, 3]]


def test_equals_transformers_greedy(model: LlamaForCausalLM) -> None:
    found = continuations(lambda t: model(t).logits, PROMPTS, 20, stop_ids=(), max_length=64)
    assert found == [by_transformers(model, prompt, 20) for prompt in PROMPTS]


def test_stops_at_the_end_of_a_text(model: LlamaForCausalLM) -> None:
    full = [by_transformers(model, prompt, 20) for prompt in PROMPTS]
    stop = full[1][4]
    batches = []

    def logits(tokens_bs: torch.Tensor) -> torch.Tensor:
        batches.append(len(tokens_bs))
        return model(tokens_bs).logits

    found = continuations(logits, PROMPTS, 20, stop_ids={stop}, max_length=64)
    assert found == [t[: t.index(stop)] if stop in t else t for t in full]
    assert batches[0] == 3
    assert batches[-1] < 3  # finished texts are not run again


def test_sees_no_more_than_max_length(model: LlamaForCausalLM) -> None:
    longest = []

    def logits(tokens_bs: torch.Tensor) -> torch.Tensor:
        longest.append(tokens_bs.shape[1])
        return model(tokens_bs).logits

    assert len(continuations(logits, [[1, 2, 3]], 12, stop_ids=(), max_length=8)[0]) == 12
    assert max(longest) == 8
