"""Intermediate terms of a micro-batch once more, in float64, from what the layers returned."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flagscale.post_training.findings import Finding, not_run, within
from flagscale.post_training.tap import STUDENT, TEACHER, Layer, Seen
from flagscale.recipe import DistillationRecipe

# Of a pair's number, from the student's width to the teacher's.
Projections = Mapping[str, torch.nn.Linear]
_NAME, _REPORTED = "intermediate loss", "intermediate distillation loss"
_RELATIVE, _PER_TOKEN = 1e-4, 1e-5  # as of other losses
_PROJECTED = 0.02  # where a projection's result is stored in 16 bits


def paired_layers(recipe: DistillationRecipe | None, stages: int) -> list[Layer]:
    """Which layers `check_layers` wants to see; none where they are on several pipeline stages.

    Args:
        recipe: the distillation, if it is one.
        stages: of the pipeline.
    """
    if recipe is None or stages > 1:
        return []
    pairs = recipe.intermediate_layer_pairs
    wanted = [(w, n) for pair in pairs for w, n in zip((STUDENT, TEACHER), pair[:2], strict=True)]
    return list(dict.fromkeys(wanted))


def check_layers(seen: Seen, recipe: DistillationRecipe, projections: Projections) -> list[Finding]:
    """The mean of the intermediate terms is float64's. TP ranks all call it.

    Args:
        seen: the micro-batch.
        recipe: the distillation.
        projections: of the pairs whose widths differ.
    """
    found = []
    if recipe.attention_layer_pairs:
        found.append(not_run("attention loss", "queries, keys and values are not looked at"))
    if not recipe.intermediate_layer_pairs:
        return found
    if not seen.layers:
        return [*found, not_run(_NAME, "its layers are on several pipeline stages")]
    mask_n = seen.mask_bs.flatten().double()
    sums = []
    for number, (ours, theirs, *kind) in enumerate(recipe.intermediate_layer_pairs):
        head = seen.heads[STUDENT]
        student_nh = head.whole(seen.layers[STUDENT, ours]).double()
        teacher_nh = head.whole(seen.layers[TEACHER, theirs]).double()
        if str(number) in projections:
            linear = projections[str(number)]
            student_nh = student_nh @ linear.weight.detach().double().T
            student_nh = student_nh + linear.bias.detach().double()
        if kind == ["mse"]:
            loss_n = (student_nh - teacher_nh).square().mean(-1)
        else:
            sizes_n = student_nh.norm(dim=-1) * teacher_nh.norm(dim=-1)
            loss_n = 1 - (student_nh * teacher_nh).sum(-1) / sizes_n
        sums.append((loss_n * mask_n).sum().item())
    unmasked = max(mask_n.sum().item(), 1)
    expected, reported = sum(sums) / len(sums) / unmasked, seen.report[_REPORTED][0] / unmasked
    in_16_bits = seen.heads[STUDENT].dtype.itemsize == 2 and bool(projections)
    allowed = (_PROJECTED if in_16_bits else _RELATIVE) * abs(expected) + _PER_TOKEN
    cause = f"the {_REPORTED} is reported as {reported:.6g} a token, but is {expected:.6g} in "
    cause += "float64 from the same layers' outputs"
    return [
        *found,
        within(_NAME, reported - expected, allowed, "mean of its terms, to float64's", cause),
    ]
