"""Part of distil-student: the end of a rung of a search, at which a candidate is measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.artifacts import Manifest, Staging, write_json
from flagscale.execution.launch import is_first_rank
from flagscale.megatron.arguments import Arguments
from flagscale.steps.search.candidate_tasks import task_losses
from flagscale.steps.search.rung import SAMPLE_LOSSES, Rung
from flagscale.train.checkpoints import TrainingState
from flagscale.train.sample_losses import SampleLosses, sample_losses

logger = logging.getLogger(__name__)

_OF_THE_STUDENT = (
    "shape",
    "keep_layers",
    "parameters",
    "memory_bytes",
    "forward_flops_per_token",
    "kd_loss_at_start",
)


def write_candidate(
    rung: Rung,
    chunks: Sequence[GPTModel],
    args: Arguments,
    state: TrainingState,
    dataset: Path,
    index: Path,
    student: Manifest,
    student_folder: Path,
    checkpoints: str,
    staging: Staging,
) -> dict[str, float]:
    """Measure a candidate, and write what a ranking needs of it. All ranks call it.

    Its weights stay in its training's checkpoint.

    Args:
        rung: which ends.
        chunks: of the model.
        args: that it was built with.
        state: of its training.
        dataset: a `dataset` artifact.
        index: folder of the samples' index.
        student: the manifest of what it started from.
        student_folder: where that lies.
        checkpoints: name of its training.
        staging: of the `candidate` artifact.

    Returns:
        Held-out losses, the steps and the speed.
    """
    losses = sample_losses(chunks, args, dataset, index, rung.samples)
    measured = len(next(iter(losses.values())))
    if rung.tasks.is_asked:
        losses |= task_losses(rung.tasks, chunks, args, dataset, student_folder, staging.path)
    figures = {f"held-out {name}": _mean(losses, name) for name in losses}
    figures |= {"steps": float(state.step), "samples": float(measured)}
    if state.median_speed is not None:
        figures["median tokens per second"] = state.median_speed
    if is_first_rank():
        write_json(staging.path / SAMPLE_LOSSES, losses)
        state.write(staging.path)
        logger.info(
            "end of a rung, after step %d: %s on %d held-out samples",
            state.step,
            ", ".join(f"{name} {_mean(losses, name):.4f}" for name in losses),
            measured,
        )
    staging.tokenizer_hash = student.tokenizer_hash
    staging.facts = {**figures, **_cost(state, args)} | {
        "checkpoints": checkpoints,
        "student": asdict(rung.student),
        "student recipe": student.recipe["student"],
        "tasks": rung.tasks.model_dump(mode="json", exclude_defaults=True),
        "made": {name: student.facts[name] for name in _OF_THE_STUDENT if name in student.facts},
    }
    return figures


def _mean(losses: SampleLosses, name: str) -> float:
    sums, counts = zip(*losses[name].values(), strict=True)
    return sum(sums) / max(1.0, sum(counts))


def _cost(state: TrainingState, args: Arguments) -> dict[str, Any]:
    """Of the training so far, its own machines' seconds added up."""
    step_tokens = args.global_batch_size * args.seq_length
    seconds = sum(step_tokens / record["tokens per second"] for record in state.training)
    return {
        "tokens": state.step * step_tokens,
        "seconds": seconds,
        "rank seconds": seconds * torch.distributed.get_world_size(),
    }
