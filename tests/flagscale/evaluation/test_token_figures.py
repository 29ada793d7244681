"""Figures of tokens against float64, and slices of the vocabulary against the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flagscale.evaluation.fidelity import FIGURES
from flagscale.evaluation.measure.token_figures import merge, slice_sums, token_figures

N = 64


def draw(vocabulary: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits of a teacher and a student that differs by `noise`, and labels."""
    generator = torch.Generator().manual_seed(seed)
    teacher_nv = torch.randn(N, vocabulary, generator=generator) * 3
    teacher_nv[:, 0] += 15
    student_nv = teacher_nv + noise * torch.randn(N, vocabulary, generator=generator)
    return teacher_nv, student_nv, torch.randint(0, vocabulary, (N,), generator=generator)


def by_hand(
    teacher_nv: torch.Tensor, student_nv: torch.Tensor, labels_n: torch.Tensor
) -> dict[str, torch.Tensor]:
    log_t, log_s = (torch.log_softmax(x.double(), -1) for x in (teacher_nv, student_nv))
    return {
        "lm_loss": -log_s.gather(-1, labels_n[:, None]).squeeze(-1),
        "kl": (log_t.exp() * (log_t - log_s)).sum(-1),
        "top1_agreement": (log_t.argmax(-1) == log_s.argmax(-1)).double(),
        "accuracy": (log_s.argmax(-1) == labels_n).double(),
    }


@pytest.mark.parametrize("noise", [3.0, 0.03, 0.003])
def test_small_kl_keeps_its_digits(noise: float) -> None:
    logits = draw(20_000, noise)
    found, expected = token_figures(*logits)[1], by_hand(*logits)
    for row, figure in zip(found, FIGURES, strict=True):
        assert float(row.sum()) == pytest.approx(float(expected[figure].sum()), rel=1e-4), figure


@given(
    vocabulary=st.integers(4, 60),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    noise=st.sampled_from([0.01, 1.0, 10.0]),
    seed=st.integers(0, 100),
)
def test_slices_of_the_vocabulary_say_what_the_whole_says(
    vocabulary: int, cuts: list[float], noise: float, seed: int
) -> None:
    teacher_nv, student_nv, labels_n = draw(vocabulary, noise, seed)
    student_nv[:, -1] = student_nv[:, 0]  # of equal ones, the first is meant
    borders = sorted({0, vocabulary, *(1 + int(cut * (vocabulary - 1)) for cut in cuts)})
    sums = [
        slice_sums(teacher_nv[:, start:end], student_nv[:, start:end], labels_n, start)
        for start, end in itertools.pairwise(borders)
    ]
    found = merge(torch.stack(sums), labels_n)
    torch.testing.assert_close(
        found, token_figures(teacher_nv, student_nv, labels_n), rtol=1e-6, atol=1e-6
    )
    of_teacher, of_student = (by_hand(teacher_nv, x, labels_n) for x in (teacher_nv, student_nv))
    for row, expected in zip(
        found.flatten(0, 1), [*of_teacher.values(), *of_student.values()], strict=True
    ):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


def test_padding_of_the_vocabulary_has_no_part_in_it() -> None:
    teacher_nv, student_nv, labels_n = draw(50, 1.0)
    padded = [torch.nn.functional.pad(x, (0, 14), value=-1e4) for x in (teacher_nv, student_nv)]
    expected = token_figures(teacher_nv, student_nv, labels_n)
    torch.testing.assert_close(token_figures(*padded, labels_n), expected, rtol=1e-7, atol=1e-7)
    # A rank may hold nothing else.
    sums = [slice_sums(*(x[:, s : s + 32] for x in padded), labels_n, s) for s in (0, 32)]
    only_padding = slice_sums(*(torch.full((N, 32), -1e4) for _ in range(2)), labels_n, 64)
    found = merge(torch.stack([*sums, only_padding]), labels_n)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_model_has_no_divergence_from_itself() -> None:
    teacher_nv, _, labels_n = draw(50, 1.0)
    sums = [slice_sums(*(teacher_nv[:, s : s + 25],) * 2, labels_n, s) for s in (0, 25)]
    whole = token_figures(teacher_nv, teacher_nv, labels_n)
    for found in (whole, merge(torch.stack(sums), labels_n)):
        assert torch.equal(found[0], found[1])
        assert found[1, 1].tolist() == [0.0] * N
        assert found[1, 2].tolist() == [1.0] * N


def test_inputs_are_left_as_they_are() -> None:
    teacher_nv, student_nv, labels_n = draw(50, 1.0)
    before = teacher_nv.clone(), student_nv.clone()
    token_figures(teacher_nv, student_nv, labels_n)
    assert torch.equal(teacher_nv, before[0])
    assert torch.equal(student_nv, before[1])


def test_logits_in_bf16_are_compared_in_float32() -> None:
    teacher_nv, student_nv, labels_n = draw(50, 1.0)
    rounded = teacher_nv.bfloat16(), student_nv.bfloat16()
    expected = token_figures(*(x.float() for x in rounded), labels_n)
    assert torch.equal(token_figures(*rounded, labels_n), expected)
