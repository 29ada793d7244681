"""Whether a training may read a `teacher-outputs` artifact: it is its teacher's, of its dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flagscale.artifacts import Manifest
from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.recipe.served import check_served
from flagscale.teacher_outputs import KIND, TeacherOutputs


def outputs_to_read(distillation: DistillationRecipe, outputs: Path | None) -> Path | None:
    """The artifact, if the training reads one.

    Args:
        distillation: says `cached` or `live`; `auto` reads what it is given.
        outputs: what it is given.

    Raises:
        UserError: it is to read one, and is given none.
    """
    if distillation.loss == "none" or distillation.teacher_outputs == "live":
        return None
    if outputs is None and distillation.teacher_outputs == "cached":
        raise UserError(
            "distillation.teacher_outputs=cached, but there are no teacher outputs: give "
            "distil-student what cache-teacher has written, or set it to live"
        )
    return outputs


def check_outputs(
    outputs: Path,
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    teacher: Path,
    parents: Mapping[str, Manifest],
) -> None:
    """Refuse an artifact that answers another question than this training asks.

    Args:
        outputs: a `teacher-outputs` artifact.
        distillation: the loss.
        training: the optimisation.
        teacher: the `teacher` artifact.
        parents: manifests of `teacher` and `dataset`.

    Raises:
        UserError: what is another, both values, and the remedy.
    """
    facts = TeacherOutputs.open(outputs).facts
    dataset = parents["dataset"]
    asked = {
        "teacher": (facts.teacher, parents["teacher"].digest),
        "dataset": (facts.dataset, dataset.digest),
        "tokenizer": (facts.tokenizer, dataset.tokenizer_hash),
        "seq_length": (facts.seq_length, dataset.facts["seq_length"]),
        "vocab_size": (facts.vocab_size, ModelShape.load(teacher).vocab_size),
        "training.reset_attention_mask": (
            facts.reset_attention_mask,
            training.reset_attention_mask,
        ),
    }
    for name, (theirs, ours) in asked.items():
        if theirs != ours:
            raise UserError(
                f"{outputs}: {KIND} of another {name}: {theirs}, but this training's is {ours}; "
                "make them anew with cache-teacher, or set distillation.teacher_outputs=live"
            )
    try:
        check_served(distillation, facts.codec)
    except ValueError as error:
        raise UserError(f"{outputs}: {error}") from error
