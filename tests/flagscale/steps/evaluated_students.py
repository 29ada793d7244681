"""Students to be evaluated, without the steps that make them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flagscale.artifacts import new_artifact, open_artifact
from flagscale.checkpoint import load_layers, save_weights
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import WEIGHTS, build_model
from flagscale.models.student_shape import student_shape
from flagscale.recipe import ArchitectureRecipe, StudentRecipe

TRAINING = [
    {
        "step": step,
        "logits distillation loss": 3 / step,
        "learning rate": 1e-3,
        "grad norm": 2 / step,
        "tokens per second": 100.0,
    }
    for step in (1, 2, 3)
]


def write_student(
    folder: Path,
    artifacts: Path,
    keep: tuple[int, ...] = (),
    architecture: ArchitectureRecipe | None = None,
) -> None:
    """Write a student of some of the teacher's layers, or a random one of an architecture.

    Args:
        folder: named `student`, or `distilled` for one that counts as trained.
        artifacts: folder of `dataset` and `teacher`, and for a trained one `student`.
        keep: which layers; none: as many as the teacher has, random.
        architecture: of a random one.
    """
    before = folder.name == "student"
    names = ("dataset", "teacher") if before else ("dataset", "teacher", "student")
    parents = {name: open_artifact(artifacts / name, name) for name in names}
    teacher = ModelShape.load(artifacts / "teacher")
    recipe = (
        StudentRecipe(keep_layers=keep)
        if keep
        else StudentRecipe(init="scratch", num_layers=teacher.num_layers, architecture=architecture)
    )
    shape, seq_length = student_shape(teacher, recipe), parents["dataset"].facts["seq_length"]
    kind = "student" if before else "distilled-student"
    with new_artifact(folder, kind, {}, parents) as staging, platform.runtime():
        model = build_model(shape, seq_length)
        if keep:
            load_layers(model, artifacts / "teacher" / WEIGHTS, keep, teacher.num_layers)
        else:
            _randomise(model)
        save_weights(model, staging.path / WEIGHTS)
        shape.save(staging.path)
        staging.tokenizer_hash = parents["teacher"].tokenizer_hash
        if not before:
            for name in ("training", "validation"):
                lines = [json.dumps(row) + "\n" for row in TRAINING]
                (staging.path / f"{name}.jsonl").write_text("".join(lines))


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.1)
