"""Greedy continuations equal transformers' own, with a key-value cache and without."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from flagscale.evaluation.generation.generate import continuations


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


class Writer:
    """A transformers model that says which token comes next; notes what was run."""

    def __init__(self, model: LlamaForCausalLM, can_cache: bool = True) -> None:
        self._model, self._can_cache = model, can_cache
        self.shapes: list[tuple[int, ...]] = []
        self.room: list[tuple[int, int]] = []

    def new_cache(self, batch_size: int, length: int) -> DynamicCache | None:
        self.room.append((batch_size, length))
        return DynamicCache() if self._can_cache else None

    def next_tokens(
        self, tokens_bs: torch.Tensor, last_b: list[int], cache: DynamicCache | None = None
    ) -> list[int]:
        self.shapes.append(tuple(tokens_bs.shape))
        logits_bsv = self._model(
            tokens_bs, past_key_values=cache, use_cache=cache is not None
        ).logits
        if cache is not None:
            assert cache.get_seq_length() <= self.room[-1][1]
        return logits_bsv[torch.arange(len(last_b)), last_b].argmax(-1).tolist()


PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [1, 2, 3]]


@pytest.mark.parametrize("can_cache", [True, False])
def test_equals_transformers_greedy(model: LlamaForCausalLM, can_cache: bool) -> None:
    found = continuations(Writer(model, can_cache), PROMPTS, 20, stop_ids=(), max_length=64)
    assert found == [by_transformers(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("can_cache", [True, False])
def test_stops_at_the_end_of_a_text(model: LlamaForCausalLM, can_cache: bool) -> None:
    full = [by_transformers(model, prompt, 20) for prompt in PROMPTS]
    for stop in {full[1][4], full[0][0], full[2][-1]}:
        writer = Writer(model, can_cache)
        found = continuations(writer, PROMPTS, 20, stop_ids={stop}, max_length=64)
        assert found == [t[: t.index(stop)] if stop in t else t for t in full]


def test_ends_when_all_texts_have(model: LlamaForCausalLM) -> None:
    stop = by_transformers(model, PROMPTS[0], 1)[0]
    writer = Writer(model)
    assert continuations(writer, PROMPTS[:1], 20, stop_ids={stop}, max_length=64) == [[]]
    assert writer.shapes == [(1, 1)]


def test_texts_of_like_lengths_run_together(model: LlamaForCausalLM) -> None:
    writer = Writer(model)
    long = list(range(1, 31))
    prompts = [[1, 2], long, [3, 4, 5, 6], [7], long[:29]]
    found = continuations(writer, prompts, 5, stop_ids=(), max_length=64)
    assert found == [by_transformers(model, prompt, 5) for prompt in prompts]
    assert writer.room == [(3, 8), (2, 34)]
    # One prompt is read to the length of the shortest; then all go on, token by token.
    assert writer.shapes == [(3, 1)] * 8 + [(2, 29)] + [(2, 1)] * 5


def test_a_text_that_outgrows_the_window_runs_again(model: LlamaForCausalLM) -> None:
    cached, plain = Writer(model), Writer(model, can_cache=False)
    prompts = [[1, 2, 3], [4, 5]]
    found = continuations(cached, prompts, 7, stop_ids=(), max_length=8)
    assert found == continuations(plain, prompts, 7, stop_ids=(), max_length=8)
    assert cached.room == [(1, 8)]
    assert cached.shapes[-1] == (1, 8)


def test_sees_no_more_than_max_length(model: LlamaForCausalLM) -> None:
    writer = Writer(model)
    assert len(continuations(writer, [[1, 2, 3]], 12, stop_ids=(), max_length=8)[0]) == 12
    assert max(length for _, length in writer.shapes) == 8
