"""Divergences of tokens against SciPy in float64; of slices of a vocabulary see the layouts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch

from flagscale.evaluation.fidelity import ALL_FIGURES
from flagscale.evaluation.measure.token_closeness import DETAILS, token_closeness
from flagscale.evaluation.measure.token_figures import largest, token_figures

N = 24
ROWS = {name: len(ALL_FIGURES) + i for i, name in enumerate(ALL_FIGURES)} | {
    name: 2 * len(ALL_FIGURES) + i for i, name in enumerate(DETAILS)
}


def draw(vocabulary: int, noise: float) -> tuple[torch.Tensor, ...]:
    """Logits of a teacher and a student that differs by `noise`, and labels."""
    generator = torch.Generator().manual_seed(0)
    teacher_nv = torch.randn(N, vocabulary, generator=generator) * 3
    teacher_nv[:, 0] += 6
    student_nv = teacher_nv + noise * torch.randn(N, vocabulary, generator=generator)
    return teacher_nv, student_nv, torch.randint(0, vocabulary, (N,), generator=generator)


def by_scipy(teacher_nv: torch.Tensor, student_nv: torch.Tensor) -> dict[str, np.ndarray]:
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (teacher_nv, student_nv))
    top_p, top_q = (np.argsort(-x, axis=-1)[:, :5] for x in (p, q))
    return {
        "reverse_kl": scipy.stats.entropy(q, p, axis=-1),
        "js_divergence": scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2,
        "top5_agreement": np.array(
            [len({*a} & {*b}) / 5 for a, b in zip(top_p, top_q, strict=True)]
        ),
        "teacher_entropy": scipy.stats.entropy(p, axis=-1),
        "teacher_confidence": p.max(-1),
        "confidence": q.max(-1),
        "teacher_guess": p.argmax(-1),
        "guess": q.argmax(-1),
    }


# A vocabulary that blocks of 64 divide, and one that they do not.
@pytest.mark.parametrize("vocabulary", [4096, 5000])
@pytest.mark.parametrize(("noise", "tolerance"), [(3.0, 1e-5), (0.1, 1e-5), (0.003, 3e-3)])
def test_equal_scipy(vocabulary: int, noise: float, tolerance: float) -> None:
    teacher_nv, student_nv, labels_n = draw(vocabulary, noise)
    found = token_closeness(teacher_nv, student_nv, labels_n)
    for name, expected in by_scipy(teacher_nv, student_nv).items():
        np.testing.assert_allclose(
            found[ROWS[name]].numpy(), expected, rtol=tolerance, atol=1e-9, err_msg=name
        )


def test_the_figures_that_every_measurement_has_are_the_same() -> None:
    logits = draw(1000, 1.0)
    found = token_closeness(*logits)[: 2 * len(ALL_FIGURES)].reshape(2, len(ALL_FIGURES), N)
    assert torch.equal(found[:, :4], token_figures(*logits))
    assert found[0, 4:].tolist() == [[0.0] * N, [0.0] * N, [1.0] * N]


def test_a_model_is_as_close_as_can_be_to_itself() -> None:
    teacher_nv, _, labels_n = draw(2048, 1.0)
    found = token_closeness(teacher_nv, teacher_nv, labels_n)
    for name, value in {"reverse_kl": 0.0, "js_divergence": 0.0, "top5_agreement": 1.0}.items():
        assert found[ROWS[name]].tolist() == [value] * N


def test_disjoint_models_are_log_2_apart() -> None:
    teacher_nv, student_nv = torch.full((2, N, 512), -60.0)
    teacher_nv[:, 3], student_nv[:, 500] = 60.0, 60.0
    found = token_closeness(teacher_nv, student_nv, torch.zeros(N, dtype=torch.int64))
    np.testing.assert_allclose(found[ROWS["js_divergence"]], np.log(2), rtol=1e-6)


def test_the_largest_of_equal_ones_is_the_first() -> None:
    for vocabulary in (640, 650):
        logits = torch.zeros(3, vocabulary)
        logits[0, [70, 200, 639]] = 2.0
        logits[1, 639] = 1.0
        top, token = largest(logits)
        assert token.squeeze(1).tolist() == [70, 639, 0]
        assert top.squeeze(1).tolist() == [2.0, 1.0, 0.0]
