"""The law of arXiv 2502.08606: its equations written out, and what the paper says of them."""

from __future__ import annotations

import math

import pytest

from flagscale.evaluation.forecast.scaling_law import distilled, overtaken, text_alone


@pytest.mark.parametrize(("size", "tokens"), [(143e6, 2.86e9), (1e9, 2e10), (7.75e9, 5.12e11)])
def test_the_equations_written_out(size: float, tokens: float) -> None:
    alone = 1.220 + (3355 / size**0.408 + 18186 / tokens**0.431) ** 0.452
    assert text_alone(size, tokens) == pytest.approx(alone, rel=1e-12)
    for teacher in (1.9, 2.3, 2.7):
        gap = (1 + (teacher / (alone * 1.315)) ** (1 / 0.090)) ** (-522.61 * 0.090)
        own = (2243 / size**0.321 + 24181 / tokens**0.637) ** 0.764
        wanted = teacher + gap * own / teacher**2.549
        assert distilled(size, tokens, teacher) == pytest.approx(wanted, rel=1e-9)


def test_a_teacher_helps_first_and_text_alone_catches_up() -> None:
    for size in (143e6, 546e6, 1.82e9):
        teacher = text_alone(4 * size, 80 * size)
        until = overtaken(size, teacher)
        assert distilled(size, until / 8, teacher) < text_alone(size, until / 8)
        assert distilled(size, until * 8, teacher) > text_alone(size, until * 8)
        assert distilled(size, until, teacher) == pytest.approx(text_alone(size, until), rel=1e-6)


def test_a_teacher_may_be_too_good_for_its_student() -> None:
    """The capacity gap: of rising teachers the best is neither the best nor the worst."""
    losses = [distilled(143e6, 5.12e11, teacher) for teacher in (1.9, 2.1, 2.3, 2.5, 2.7)]
    best = losses.index(min(losses))
    assert 0 < best < 4


def test_a_student_keeps_above_its_teacher_and_needs_one_that_is_better_than_itself() -> None:
    assert distilled(1e9, 1e12, 2.4) > 2.4
    assert overtaken(1e9, 3.5) < 1e9
    assert math.isfinite(overtaken(1e9, 2.0))
