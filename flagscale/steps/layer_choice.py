"""Part of convert-student: which of the teacher's layers the student keeps, why, and its sizes."""

from __future__ import annotations

import gc
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flagscale import tracking
from flagscale.artifacts import Staging, write_json
from flagscale.data.calibration import Calibration, calibration
from flagscale.evaluation.layer_importance import LayerImportance, measure_importance
from flagscale.evaluation.student_report import render
from flagscale.execution.launch import is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import load_model
from flagscale.models.student_shape import layers_to_keep, num_layers
from flagscale.recipe import StudentRecipe
from flagscale.sizes.work import forward_flops

logger = logging.getLogger(__name__)

REPORT = "report.html"
LAYER_IMPORTANCE = "layer_importance.json"
CALIBRATION_TOKENS = 4096
_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
)


@dataclass(frozen=True)
class LayerChoice:
    """Which of the teacher's layers are kept.

    Attributes:
        kept: from 0; empty where the student starts from none.
        importance: where they were measured.
        digest: of the text that they were measured on.
    """

    kept: tuple[int, ...] = ()
    importance: LayerImportance | None = None
    digest: str | None = None


def choose_layers(
    student: StudentRecipe, teacher: Path, dataset: Path, args: Arguments
) -> LayerChoice:
    """Decide, where need be by measuring. All ranks call it.

    Args:
        student: the recipe's section.
        teacher: the artifact, which is loaded to be measured, and gone afterwards.
        dataset: the artifact whose train split is measured on.
        args: that the models are built with.
    """
    if student.init in ("scratch", "pretrained"):
        return LayerChoice()
    count = ModelShape.load(teacher).num_layers
    if not student.measures_layers:
        return LayerChoice(layers_to_keep(count, student))
    tokens = student.calibration_tokens or CALIBRATION_TOKENS
    text = calibration_text(tokens, student.seed, dataset)
    model = load_model(teacher, args.seq_length, args.parallelism, args.params_dtype)
    gone = count - num_layers(count, student)
    logger.info("measuring which %d of %d layers can go, on %d tokens", gone, count, text.tokens)
    found = measure_importance(model, text.batches, student.layer_importance, gone)
    del model
    gc.collect()  # modules refer to each other
    return LayerChoice(found.kept, found, text.digest)


def needs(shape: ModelShape, seq_length: int, stored: torch.dtype) -> dict[str, float]:
    """What a model of this shape takes where it is used; nothing for a layer spec of one's own."""
    if shape.architecture.spec is not None:
        return {}
    keys_and_values = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels
    return {
        "forward_flops_per_token": forward_flops(shape, 1, seq_length),
        "kv_cache_bytes_per_token": float(keys_and_values * stored.itemsize),
    }


def record(choice: LayerChoice, shape: ModelShape, staging: Staging, run: tracking.StepRun) -> None:
    """Say what the student is, and why: in the artifact and to MLflow. The first rank calls it."""
    facts: dict[str, Any] = {"shape": {name: getattr(shape, name) for name in _SHAPE}}
    if choice.kept:
        facts["keep_layers"] = list(choice.kept)
    if choice.importance is not None:
        facts["layer_importance"] = _record_importance(choice, staging.path, run)
    staging.facts.update(facts)
    run.log_params(facts)
    (staging.path / REPORT).write_text(render(staging.facts, choice.importance), encoding="utf-8")
    run.log_artifact(staging.path / REPORT)


def _record_importance(choice: LayerChoice, folder: Path, run: tracking.StepRun) -> dict[str, Any]:
    found = choice.importance
    assert found is not None, "it was measured"
    facts = {
        "criterion": found.criterion,
        "calibration_tokens": found.tokens,
        "calibration_digest": choice.digest,
    }
    write_json(
        folder / LAYER_IMPORTANCE,
        facts
        | {
            "scores": list(found.scores),
            "removals": [asdict(removal) for removal in found.removals],
            "kept": list(found.kept),
        },
    )
    run.log_artifact(folder / LAYER_IMPORTANCE)
    for gone, removal in enumerate(found.removals, start=1):
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
    """What importance is measured on; the first rank reads it for all. All ranks call it."""
    told: list[Calibration | None] = [None]
    if is_first_rank():
        with tempfile.TemporaryDirectory(prefix="flagscale-calibration-") as cache:
            told = [calibration(dataset, Path(cache), tokens, seed, platform.device().type)]
    torch.distributed.broadcast_object_list(told, src=0)
    assert told[0] is not None, "the first rank is one of them"
    return told[0]
