"""A check of every divergence that a recipe may choose, on the logits of the models at hand."""

from __future__ import annotations

import math
from typing import get_args

import torch

from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.divergences.reference import reference_gradient, reference_loss
from flagscale.post_training.findings import Finding, within
from flagscale.post_training.float64 import some_logits
from flagscale.post_training.tap import Seen
from flagscale.recipe import DistillationRecipe

DIVERGENCES = get_args(DistillationRecipe.model_fields["divergence"].annotation)
_ROWS = 16
_TOLERANCE = 1e-3  # in fp32, from logits that are rounded to it
_WHEN_EQUAL = 1e-6


def check_family(seen: Seen) -> list[Finding]:
    """Value and gradient of each are its float64 reference's, and 0 where the models are equal.

    Args:
        seen: a micro-batch. TP ranks all call it.
    """
    rows = some_logits(seen, _ROWS)
    student_nv, teacher_nv = (logits_nv.float() for logits_nv in rows)
    worst, away = (0.0, ""), (0.0, "")
    for name in DIVERGENCES:
        temperature = 1.0 if name == "logits_mse" else 2.0  # whose factor cancels there
        recipe = DistillationRecipe(divergence=name, temperature=temperature)
        worst = max(worst, (_difference(recipe, student_nv, teacher_nv), name))
        away = max(away, (_when_equal(recipe, teacher_nv), name))
    note = (
        f"of {len(DIVERGENCES)}, largest difference of value or gradient to float64's, as a share"
    )
    return [
        within(
            "divergences",
            worst[0],
            _TOLERANCE,
            note,
            f"{worst[1]} differs by {worst[0]:.3g} of itself from its definition in float64",
        ),
        within(
            "divergences when equal",
            away[0],
            _WHEN_EQUAL,
            "largest loss or gradient of equal logits",
            f"{away[1]} of equal logits is {away[0]:.3g}, not 0",
        ),
    ]


def _difference(
    recipe: DistillationRecipe, student_nv: torch.Tensor, teacher_nv: torch.Tensor
) -> float:
    value_n = reference_loss(student_nv, teacher_nv, recipe)
    gradient_nv = reference_gradient(student_nv, teacher_nv, recipe)
    found_n, found_nv = divergence_of(recipe).loss_and_gradient(student_nv.clone(), teacher_nv)
    assert found_nv is not None, "asked for"
    # Of equal models both are nothing, and so is what rounding makes of them.
    values = (found_n - value_n).abs().sum() / (value_n.abs().sum() + 1e-3 * value_n.numel())
    gradients = (found_nv - gradient_nv).norm() / (gradient_nv.norm() + 1e-3)
    return _largest(values, gradients)


def _when_equal(recipe: DistillationRecipe, teacher_nv: torch.Tensor) -> float:
    loss_n, gradient_nv = divergence_of(recipe).loss_and_gradient(teacher_nv.clone(), teacher_nv)
    assert gradient_nv is not None, "asked for"
    return _largest(loss_n.abs().max(), gradient_nv.abs().max())


def _largest(*figures: torch.Tensor) -> float:
    """Infinite if one is no number."""
    return torch.stack([one.double() for one in figures]).nan_to_num(nan=math.inf).max().item()
