"""Part of convert-student: a student that is narrower than its teacher, and what it was cut by."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
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
from flagscale.steps.student.layer_choice import calibration_text

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

    @property
    def shares(self) -> dict[str, list[float]]:
        """What share of all importance the most important one, two, ..., all of a size have.

        Of what became smaller, by the recipe's names, mean over layers; heads aside, which go by
        groups.
        """
        found: dict[str, list[torch.Tensor]] = {}
        for name, scores in self.scores.items():
            kind = _size_of(name)
            if kind in self.sizes and scores.any():
                sums = scores.double().sort(descending=True).values.cumsum(0)
                found.setdefault(kind, []).append(sums / sums[-1])
        return {kind: torch.stack(each).mean(dim=0).tolist() for kind, each in found.items()}


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
        "kept_importance": {
            kind: round(shares[found.sizes[kind] - 1], 6) for kind, shares in found.shares.items()
        },
        "calibration_tokens": found.tokens,
        "calibration_digest": found.digest,
    }
    staging.facts["width_importance"] = facts
    run.log_params({"width_importance": facts})
    run.log_artifact(path)


def _size_of(name: str) -> str | None:
    """Which size the scores of that name are of; None of heads."""
    if name.endswith(".self_attention"):
        return None
    kinds = {".mlp": "ffn_hidden_size", ".experts": "num_experts", "hidden_size": "hidden_size"}
    ends = (kind for end, kind in kinds.items() if name.endswith(end))
    return next(ends, "moe_ffn_hidden_size")
