"""Student and teacher become one distillation model of ModelOpt's."""

from __future__ import annotations

from types import MethodType

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.post_training.cached_teacher import CachedTeacher, hand_on_samples
from flagscale.post_training.divergences import (
    Divergence,
    SparseKL,
    divergence_of,
    sparse_divergence_of,
)
from flagscale.post_training.fused_output_layer import fuse_output_layer
from flagscale.post_training.intermediate_terms import IntermediateTerms, attach
from flagscale.post_training.losses import LogitsLoss, WeightedLossBalancer
from flagscale.post_training.upstream import mtd, mtd_megatron
from flagscale.recipe import DistillationRecipe

_OUTPUT_LAYERS = ("output_layer", "output_layer")


def convert_for_distillation(
    student: GPTModel,
    teacher: GPTModel | CachedTeacher,
    distillation: DistillationRecipe,
    seed: int = 1234,
) -> mtd.DistillationModel:
    """Convert `student` in place to ModelOpt's `kd_loss` mode.

    Its forward pass then runs the teacher too, and `compute_kd_loss` compares what both computed.
    The teacher is frozen and stays out of state dicts.

    Args:
        student: this pipeline stage's part; so is the teacher.
        teacher: in evaluation mode, or what it answered once.
        distillation: the losses. Layers are counted over the whole model.
        seed: of the projections between widths that differ.

    Raises:
        ValueError: the two vocabularies differ (what is padding of one is a token of the other, or
            its rows are not as many), or a layer is not as the pair says.
        UserError: an intermediate layer does not exist, or cannot be compared.
    """
    sizes = [(model.unpadded_vocab_size, model.vocab_size) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "the student's vocabulary ({}, padded to {}) must be the teacher's ({}, padded to "
            "{})".format(*sizes[0], *sizes[1])
        )
    divergence = _divergence(teacher, distillation)
    config = mtd_megatron.DistillationConfig(
        skip_lm_loss=distillation.skip_lm_loss,
        kd_loss_scale=distillation.kd_loss_scale,
        logit_kl_temperature=distillation.temperature,
        criterion=_criteria(student, divergence),
        loss_balancer=WeightedLossBalancer(distillation.skip_lm_loss, distillation.kd_loss_scale),
    )
    mode = {
        "teacher_model": teacher,
        "criterion": config.criterion,
        "loss_balancer": config.loss_balancer,
    }
    terms = IntermediateTerms(student, teacher, distillation, seed)
    model = mtd.convert(student, mode=[("kd_loss", mode)])
    mtd_megatron.adjust_distillation_model_for_mcore(model, config)
    attach(terms, model)
    _keep_logits_for_the_kd_loss(model)
    fuse_output_layer(model, divergence, distillation)
    if isinstance(teacher, CachedTeacher):
        hand_on_samples(model)
    return model


def _divergence(
    teacher: GPTModel | CachedTeacher, distillation: DistillationRecipe
) -> Divergence | SparseKL:
    if isinstance(teacher, CachedTeacher) and not teacher.has_logits:
        return sparse_divergence_of(distillation)
    return divergence_of(distillation)


def _criteria(
    student: GPTModel, divergence: Divergence | SparseKL
) -> dict[tuple[str, str], torch.nn.Module]:
    if not student.post_process:
        return {}
    return {_OUTPUT_LAYERS: LogitsLoss(student.config, divergence)}


def _keep_logits_for_the_kd_loss(model: mtd.DistillationModel) -> None:
    """Let the student's cross entropy work on a copy of its logits.

    Megatron-Core's cross entropy overwrites fp32 logits in place, before the KD loss reads them:
    the KD loss is then silently that of other numbers. In bf16 it makes itself an fp32 copy, so
    this costs fp32 what bf16 pays anyway.
    """
    compute = model.compute_language_model_loss

    def compute_language_model_loss(
        self: GPTModel, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        if logits.dtype == torch.float32 and not (self.training and _skips_lm_loss(self)):
            logits = logits.clone()
        return compute(labels, logits)

    model.compute_language_model_loss = MethodType(compute_language_model_loss, model)


def _skips_lm_loss(model: mtd.DistillationModel) -> bool:
    return model.loss_balancer.skip_lm_loss
