"""Figures against an independent float64 computation; windows, padding and batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from flagscale.errors import UserError
from flagscale.evaluation.fidelity import (
    FIGURES,
    LogitsFunction,
    compare_rows,
    measure,
    read_rows,
)

VOCAB = 101


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def as_function(model: LlamaForCausalLM) -> LogitsFunction:
    return lambda tokens_bs: model(tokens_bs).logits.float()


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return make_model(0)


@pytest.fixture(scope="module")
def student() -> LlamaForCausalLM:
    return make_model(1)


MODELS = as_function(make_model(0)), as_function(make_model(1))


def make_documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


@torch.no_grad()
def figures_by_hand(
    teacher: LlamaForCausalLM, student: LlamaForCausalLM, document: np.ndarray, seq_length: int
) -> dict[str, float]:
    """Token by token, one window at a time, in float64, from transformers' logits."""
    sums = dict.fromkeys(FIGURES, 0.0)
    ids = torch.from_numpy(document.astype(np.int64))
    for position in range(1, len(ids)):
        start = (position - 1) // seq_length * seq_length
        context = ids[None, start:position]
        log_t = model_log_probs(teacher, context)
        log_s = model_log_probs(student, context)
        label = int(ids[position])
        sums["lm_loss"] -= float(log_s[label])
        sums["kl"] += float(
            torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="sum")
        )
        sums["top1_agreement"] += float(log_t.argmax() == log_s.argmax())
        sums["accuracy"] += float(log_s.argmax() == label)
    return sums


def model_log_probs(model: LlamaForCausalLM, context: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(context).logits[0, -1].double(), dim=-1)


def test_figures_equal_an_independent_float64_computation(
    teacher: LlamaForCausalLM, student: LlamaForCausalLM
) -> None:
    documents = make_documents([2, 9, 17, 25, 8, 5])
    result = measure(as_function(teacher), {"student": as_function(student)}, documents, 8, 3)
    assert result.tokens_d.tolist() == [1, 8, 16, 24, 7, 4]
    for d, document in enumerate(documents):
        expected = figures_by_hand(teacher, student, document, seq_length=8)
        for figure in FIGURES:
            assert result.sums["student"][figure][d] == pytest.approx(expected[figure], rel=1e-5)
        own = figures_by_hand(teacher, teacher, document, seq_length=8)
        for figure in ("lm_loss", "accuracy"):
            assert result.sums["teacher"][figure][d] == pytest.approx(own[figure], rel=1e-5)


def test_teacher_as_student_has_no_kl_and_full_agreement(teacher: LlamaForCausalLM) -> None:
    documents = make_documents([12, 30])
    result = measure(as_function(teacher), {"copy": as_function(teacher)}, documents, 8, 2)
    for model in ("teacher", "copy"):
        assert result.sums[model]["kl"].tolist() == [0.0, 0.0]
        assert (result.sums[model]["top1_agreement"] == result.tokens_d).all()
    np.testing.assert_array_equal(result.sums["copy"]["lm_loss"], result.sums["teacher"]["lm_loss"])


@pytest.mark.parametrize("noise", [3.0, 0.03, 0.003])
def test_small_kl_keeps_its_digits(noise: float) -> None:
    torch.manual_seed(0)
    teacher_nv = torch.randn(64, 20_000) * 3
    teacher_nv[:, 0] += 15
    student_nv = teacher_nv + noise * torch.randn(64, 20_000)
    log_t, log_s = (torch.log_softmax(x.double(), -1) for x in (teacher_nv, student_nv))
    expected = (log_t.exp() * (log_t - log_s)).sum()
    kl = compare_rows(teacher_nv, student_nv, torch.zeros(64, dtype=torch.int64))[1]
    assert float(kl) == pytest.approx(float(expected), rel=1e-4)


def test_inputs_are_left_as_they_are() -> None:
    teacher_nv, student_nv = torch.randn(5, 11), torch.randn(5, 11)
    before = teacher_nv.clone(), student_nv.clone()
    compare_rows(teacher_nv, student_nv, torch.arange(5))
    assert torch.equal(teacher_nv, before[0])
    assert torch.equal(student_nv, before[1])


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=7),
    seq_length=st.integers(4, 20),
    micro_batch_size=st.integers(1, 6),
)
def test_batching_and_padding_change_nothing(
    lengths: list[int], seq_length: int, micro_batch_size: int
) -> None:
    teacher, student = MODELS
    documents = make_documents(lengths)
    alone = measure(teacher, {"student": student}, documents, seq_length, 1)
    together = measure(teacher, {"student": student}, documents, seq_length, micro_batch_size)
    for figure in FIGURES:
        np.testing.assert_allclose(
            together.sums["student"][figure], alone.sums["student"][figure], rtol=1e-5
        )
    assert together.documents == alone.documents


def test_every_token_but_the_first_is_predicted_once() -> None:
    seen: list[int] = []

    def uniform(tokens_bs: torch.Tensor) -> torch.Tensor:
        seen.extend(tokens_bs.flatten().tolist())
        return torch.zeros(*tokens_bs.shape, VOCAB)

    document = np.arange(1, 24)
    result = measure(uniform, {}, [document], seq_length=5, micro_batch_size=2)
    assert sorted(token for token in seen if token) == list(range(1, 23))
    assert result.sums["teacher"]["lm_loss"][0] == pytest.approx(22 * np.log(VOCAB), rel=1e-7)


def test_the_teacher_runs_once_for_all_students() -> None:
    calls = []

    def teacher(tokens_bs: torch.Tensor) -> torch.Tensor:
        calls.append(tokens_bs.shape)
        return torch.zeros(*tokens_bs.shape, VOCAB)

    students = {name: (lambda t: torch.ones(*t.shape, VOCAB)) for name in "abc"}
    measure(teacher, students, make_documents([9, 9, 9]), 8, 2)
    assert calls == [(2, 8), (1, 8)]


def test_diverged_model_is_named(teacher: LlamaForCausalLM) -> None:
    def diverged(tokens_bs: torch.Tensor) -> torch.Tensor:
        return torch.full((*tokens_bs.shape, VOCAB), float("nan"))

    with pytest.raises(UserError, match="the distilled model's logits are not finite"):
        measure(as_function(teacher), {"distilled": diverged}, make_documents([5]), 8, 2)


def test_rows_survive_json(teacher: LlamaForCausalLM, student: LlamaForCausalLM) -> None:
    documents = make_documents([12, 30])
    result = measure(as_function(teacher), {"student": as_function(student)}, documents, 8, 2)
    again = read_rows([json.loads(json.dumps(row)) for row in result.rows()])
    assert again.documents == result.documents
    for model in ("teacher", "student"):
        for figure in FIGURES:
            np.testing.assert_array_equal(again.sums[model][figure], result.sums[model][figure])


def test_documents_are_known_by_their_tokens() -> None:
    a, b = make_documents([9, 9])
    uniform = lambda tokens_bs: torch.zeros(*tokens_bs.shape, VOCAB)  # noqa: E731
    first = measure(uniform, {}, [a, b], 8, 2).documents
    assert first == measure(uniform, {}, [a.astype(np.int64), b], 4, 1).documents
    assert first != measure(uniform, {}, [b, a], 8, 2).documents
