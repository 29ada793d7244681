"""Part of convert-student: a student that is narrower than its teacher, and what it was cut by."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file

from flagscale import tracking
from flagscale.artifacts import Staging
from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.models.cut_shape import cut_widths
from flagscale.models.narrow import narrow_model
from flagscale.post_training.minitron import Scores
from flagscale.recipe import ModelsRecipe, StudentRecipe
from flagscale.recipe.combinations import check_width_pruning
from flagscale.steps.layer_choice import calibration_text

logger = logging.getLogger(__name__)

WIDTH_IMPORTANCE = "width_importance.safetensors"


@dataclass(frozen=True)
class Narrowing:
    """What a student was made narrower by.

    Attributes:
        sizes: what became smaller, by the recipe's names, and how small.
        scores: see `flagscale.post_training.minitron.prune_width`; layers are the student's.
        tokens: of the text that they were measured on.
        digest: of that text.
    """

    sizes: dict[str, int]
    scores: Scores
    tokens: int
    digest: str


def check_pruning(student: StudentRecipe, models: ModelsRecipe) -> None:
    """Refuse a layout that widths are not pruned on.

    Raises:
        UserError: the field, and what would do.
    """
    try:
        check_width_pruning(student, models.sizes)
    except ValueError as error:
        raise UserError(str(error)) from None


def narrow_student(
    student: StudentRecipe,
    dataset: Path,
    wide: GPTModel,
    shapes: tuple[ModelShape, ModelShape],
    build: Callable[[], GPTModel],
) -> tuple[GPTModel, Narrowing]:
    """The student of a model that is as deep as it. All ranks call it.

    Args:
        student: the recipe's section, its targets met.
        dataset: the artifact whose train split is measured on.
        wide: this rank's part of the deep model, which is of no use afterwards.
        shapes: the wide model's and the student's.
        build: makes this rank's part of the student.
    """
    text = calibration_text(student.measured_tokens, student.seed, dataset)
    sizes = cut_widths(*shapes)
    logger.info("pruning to %s by activations on %d tokens", sizes, text.tokens)
    batches = [batch["tokens"] for batch in text.batches]
    model, scores = narrow_model(wide, build, sizes, batches)
    del wide
    gc.collect()  # modules refer to each other
    return model, Narrowing(sizes, scores, text.tokens, text.digest)


def record_narrowing(found: Narrowing | None, staging: Staging, run: tracking.StepRun) -> None:
    """Say what was pruned and why: in the artifact and to MLflow. The first rank calls it."""
    if found is None:
        return
    path = staging.path / WIDTH_IMPORTANCE
    save_file({name: scores.contiguous() for name, scores in found.scores.items()}, path)
    facts = {
        "criterion": "activations (arXiv 2407.14679)",
        "sizes": found.sizes,
        "kept_importance": _kept_importance(found),
        "calibration_tokens": found.tokens,
        "calibration_digest": found.digest,
    }
    staging.facts["width_importance"] = facts
    run.log_params({"width_importance": facts})
    run.log_artifact(path)


def _kept_importance(found: Narrowing) -> dict[str, float]:
    """The share of all importance that stays, mean over layers; heads aside, which go by groups."""
    shares: dict[str, list[float]] = {}
    for name, scores in found.scores.items():
        if name == "hidden_size":
            kind = name
        elif name.endswith(".mlp"):
            kind = "ffn_hidden_size"
        elif name.endswith(".experts"):
            kind = "num_experts"
        else:
            kind = "moe_ffn_hidden_size"
        if kind in found.sizes and not name.endswith(".self_attention"):
            kept = scores.topk(found.sizes[kind]).values.sum() / scores.sum()
            shares.setdefault(kind, []).append(kept.nan_to_num().item())
    return {kind: round(sum(each) / len(each), 6) for kind, each in shares.items()}
