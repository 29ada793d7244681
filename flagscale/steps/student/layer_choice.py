"""Part of convert-student: which of the teacher's layers the student keeps, why, and its sizes."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from flagscale import tracking
from flagscale.artifacts import Staging, write_json
from flagscale.data.calibration import Calibration, calibration
from flagscale.errors import UserError
from flagscale.evaluation.pages.student import render
from flagscale.execution.launch import is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import load_model
from flagscale.models.reconstruction import Fit, layer_targets, reconstruct
from flagscale.models.student_shape import layers_to_keep, num_layers
from flagscale.recipe import StudentRecipe
from flagscale.sizes.use import memory_in_use
from flagscale.sizes.work import forward_flops
from flagscale.steps.student.measured_layers import FILE, Measurement, measure, measured_before

logger = logging.getLogger(__name__)

REPORT = "report.html"
_CALIBRATION = ("calibration_tokens", "calibration_digest")
_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
)


@dataclass
class LayerChoice:
    """Which of the teacher's layers are kept, and what the student's are fitted to.

    Attributes:
        kept: from 0; empty where the student starts from none.
        measured: where they were.
        text: that they are fitted on, where they are.
        targets: what each is to put out, [s, b, h]; gone when they are fitted.
        fits: how well each does, once it is fitted.
    """

    kept: tuple[int, ...] = ()
    measured: Measurement | None = None
    text: Calibration | None = None
    targets: list[torch.Tensor] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)

    def take(self, measured: Measurement | None) -> None:
        """Keep what was measured to be kept, if it was."""
        if measured is not None:
            self.measured, self.kept = measured, measured.importance.kept


def choose_layers(
    student: StudentRecipe,
    teacher: Path,
    dataset: Path,
    args: Arguments,
    importance: Path | None = None,
) -> LayerChoice:
    """Decide, where need be by measuring. All ranks call it.

    Args:
        student: the recipe's section.
        teacher: the artifact, which is loaded to be measured, and gone afterwards.
        dataset: the artifact whose train split is measured on.
        args: that the models are built with.
        importance: the artifact of what was measured for all students of a run, if there is one.
    """
    if student.init in ("scratch", "pretrained"):
        return LayerChoice()
    count = ModelShape.load(teacher).num_layers
    gone = count - num_layers(count, student)
    choice = LayerChoice()
    if student.measures_layers and gone > 0:
        choice.take(measured_before(student, importance, teacher, dataset, gone))
    else:
        choice.kept = layers_to_keep(count, student)
    if choice.kept and student.reconstruction is None:
        return choice
    model = load_model(teacher, args.seq_length, args.parallelism, args.params_dtype)
    if not choice.kept:
        text = calibration_text(student.measured_tokens, student.seed, dataset)
        choice.take(measure(student, teacher, args, model, text, gone))
    if student.reconstruction is not None:
        choice.text = calibration_text(student.reconstruction.tokens, student.seed, dataset)
        choice.targets = layer_targets(model, choice.text.whole, choice.kept)
    del model
    gc.collect()  # modules refer to each other
    return choice


def check_reconstruction(student: StudentRecipe, teacher: ModelShape) -> None:
    """Refuse to fit what would not be fitted well.

    Raises:
        UserError: the teacher has experts.
    """
    if student.reconstruction is not None and teacher.architecture.num_experts is not None:
        raise UserError(
            "student.reconstruction: the teacher has experts, each of which sees few of the "
            "tokens that are fitted on; leave it out"
        )


def fit_layers(student: StudentRecipe, model: GPTModel, choice: LayerChoice) -> None:
    """Fit the student's layers, if that is asked for. All ranks call it.

    Args:
        student: the recipe's section.
        model: this rank's part of the student, with the teacher's weights; changed.
        choice: of `choose_layers`; its targets are used up.
    """
    if student.reconstruction is None or choice.text is None:
        return
    ridge = student.reconstruction.ridge
    logger.info("fitting %d layers, on %d tokens", len(choice.kept), choice.text.tokens)
    choice.fits = reconstruct(model, choice.text.whole, choice.targets, ridge)
    choice.targets.clear()
    before, after = choice.fits[-1].before, choice.fits[-1].after
    logger.info("error of the last layer's output: %.3f of its size, fitted %.3f", before, after)


def needs(shape: ModelShape, seq_length: int, stored: torch.dtype) -> dict[str, float]:
    """What a model of this shape takes where it is used; nothing where layers have own sizes."""
    own = shape.architecture.spec, shape.architecture.heterogeneous_layers_config
    if any(layers is not None for layers in own):
        return {}
    keys_and_values = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels
    return {
        "forward_flops_per_token": forward_flops(shape, 1, seq_length),
        "kv_cache_bytes_per_token": float(keys_and_values * stored.itemsize),
        "memory_bytes": float(memory_in_use(shape, seq_length, stored.itemsize)),
    }


def record(
    choice: LayerChoice,
    widths: Mapping[str, Sequence[float]],
    shape: ModelShape,
    staging: Staging,
    run: tracking.StepRun,
) -> None:
    """Say what the student is, and why: in the artifact and to MLflow. The first rank calls it.

    Args:
        choice: of its layers.
        widths: see `flagscale.evaluation.pages.student.render`.
        shape: of the student.
        staging: its artifact.
        run: the step's.
    """
    facts: dict[str, Any] = {"shape": {name: getattr(shape, name) for name in _SHAPE}}
    if choice.kept:
        facts["keep_layers"] = list(choice.kept)
    if choice.measured is not None:
        facts["layer_importance"] = _record_importance(choice.measured, staging.path, run)
    if choice.text is not None:
        facts["reconstruction"] = {
            "calibration_tokens": choice.text.tokens,
            "calibration_digest": choice.text.digest,
            "error_before": [round(fit.before, 6) for fit in choice.fits],
            "error_after": [round(fit.after, 6) for fit in choice.fits],
        }
    staging.facts.update(facts)
    run.log_params(facts)
    importance = choice.measured.importance if choice.measured else None
    (staging.path / REPORT).write_text(render(staging.facts, importance, widths), encoding="utf-8")
    run.log_artifact(staging.path / REPORT)


def _record_importance(
    measured: Measurement, folder: Path, run: tracking.StepRun
) -> dict[str, Any]:
    values = measured.values()
    facts = {name: values[name] for name in ("criterion", *_CALIBRATION)}
    write_json(folder / FILE, values)
    run.log_artifact(folder / FILE)
    for gone, removal in enumerate(measured.importance.removals, start=1):
        run.log_metrics(
            {
                "cut layer": removal.layer,
                "cut kl": removal.kl,
                "cut top1_agreement": removal.top1_agreement,
            },
            step=gone,
        )
    return facts


def calibration_text(tokens: int, seed: int, dataset: Path) -> Calibration:
    """What is measured, or fitted, on; the first rank reads it for all. All ranks call it."""
    told: list[Calibration | None] = [None]
    if is_first_rank():
        with tempfile.TemporaryDirectory(prefix="flagscale-calibration-") as cache:
            told = [calibration(dataset, Path(cache), tokens, seed, platform.device().type)]
    torch.distributed.broadcast_object_list(told, src=0)
    assert told[0] is not None, "the first rank is one of them"
    return told[0]
