"""The audit of a student's artifact beside its teacher's and the dataset's: all that is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage

from flagscale.artifacts import Manifest
from flagscale.checkpoint import load_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.models.audit_artifacts import check_kept, check_stored, check_tokenizers
from flagscale.models.distillation_audit import AUDITED_LOSS, Audited, Batch, audit
from flagscale.models.distillation_proof import PROOF_LOSS
from flagscale.models.megatron import WEIGHTS, load_model
from flagscale.post_training.export import plain_student
from flagscale.post_training.findings import of_all_ranks
from flagscale.recipe import DistillationRecipe
from flagscale.train.train_gpt import model_provider


@dataclass(frozen=True)
class Artifacts:
    """What a student was made of.

    Attributes:
        student: the artifact's folder.
        teacher: ditto.
        dataset: ditto.
        manifests: of `teacher` and `dataset`.
        copied: which of the teacher's layers the student's are; None: its weights are its own.
        dtype: that the student is stored in.
    """

    student: Path
    teacher: Path
    dataset: Path
    manifests: Mapping[str, Manifest]
    copied: Sequence[int] | None
    dtype: torch.dtype


def load_pair(artifacts: Artifacts, args: Arguments) -> tuple[GPTModel, GPTModel]:
    """This rank's part of student and teacher, built and read as training does, as plain models.

    All ranks call it.

    Args:
        artifacts: the models'.
        args: of the student.
    """
    # As it is stored: quantised, where it is.
    args = replace(
        args, shape=ModelShape.load(artifacts.student), export_quant_load=artifacts.student
    )
    if args.shape.architecture.mtp_num_layers:  # which is never distilled
        student, teacher = (
            load_model(path, args.seq_length, args.parallelism, args.params_dtype)
            for path in (artifacts.student, artifacts.teacher)
        )
        return student, teacher
    with use_args(with_teacher(args, artifacts.teacher, PROOF_LOSS)):
        model = model_provider(is_pipeline_first_stage(), is_pipeline_last_stage())
    model.to(platform.device())
    load_weights(model, artifacts.student / WEIGHTS)
    teacher = model.teacher_model
    return plain_student(model).eval(), teacher.eval()


def audit_student(
    artifacts: Artifacts,
    student: GPTModel,
    teacher: GPTModel,
    batch: Batch,
    unigram: float,
    recipe: DistillationRecipe = AUDITED_LOSS,
) -> Audited:
    """Run every check. All ranks call it, within `use_args` as `audit`.

    Args:
        artifacts: what the models were read from.
        student: from `load_pair`.
        teacher: ditto.
        batch: from `audited_batch`.
        unigram: ditto.
        recipe: see `audit`.

    Returns:
        The findings of all ranks, the same on each.
    """
    found = []
    if torch.distributed.get_rank() == 0:
        found += check_tokenizers(artifacts.teacher, artifacts.dataset, artifacts.manifests, batch)
    stored = getattr(torch, artifacts.manifests["teacher"].facts.get("dtype", "float32"))
    for whose, model, folder, dtype in (
        ("teacher", teacher, artifacts.teacher, stored),
        ("student", student, artifacts.student, artifacts.dtype),
    ):
        found.append(check_stored(whose, model, folder / WEIGHTS, dtype))
    found.append(check_kept(student, teacher, artifacts.copied))
    audited = audit(student, teacher, batch, unigram, recipe)
    return replace(audited, findings=of_all_ranks([*found, *audited.findings]))
