"""Student and teacher become one distillation model of ModelOpt's."""

from __future__ import annotations

import re
from types import MethodType

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.losses import (
    HiddenStateCosineLoss,
    LogitsLoss,
    MSELoss,
    WeightedLossBalancer,
)
from flagscale.post_training.upstream import mtd, mtd_megatron
from flagscale.recipe import DistillationRecipe

_INTERMEDIATE_LOSSES = {"cosine": HiddenStateCosineLoss, "mse": MSELoss}
_OUTPUT_LAYERS = ("output_layer", "output_layer")


def convert_for_distillation(
    student: GPTModel, teacher: GPTModel, distillation: DistillationRecipe, seed: int = 1234
) -> mtd.DistillationModel:
    """Convert `student` in place to ModelOpt's `kd_loss` mode.

    Its forward pass then runs the teacher too, and `compute_kd_loss` compares what both computed.
    The teacher is frozen and stays out of state dicts.

    Args:
        student: this pipeline stage's part; so is the teacher.
        teacher: in evaluation mode.
        distillation: the losses. Layers are counted over the whole model.
        seed: of the projection between hidden sizes that differ.

    Raises:
        ValueError: the two vocabularies differ, or an intermediate layer does not exist, or is not
            on the last pipeline stage, the one that computes losses.
    """
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"the student's vocabulary ({student.vocab_size}, padded) must be the teacher's "
            f"({teacher.vocab_size})"
        )
    config = mtd_megatron.DistillationConfig(
        skip_lm_loss=distillation.skip_lm_loss,
        kd_loss_scale=distillation.kd_loss_scale,
        logit_kl_temperature=distillation.temperature,
        criterion=_criteria(student, teacher, distillation, seed),
        loss_balancer=WeightedLossBalancer(
            distillation.skip_lm_loss,
            distillation.kd_loss_scale,
            distillation.intermediate_loss_scale,
        ),
    )
    mode = {
        "teacher_model": teacher,
        "criterion": config.criterion,
        "loss_balancer": config.loss_balancer,
    }
    model = mtd.convert(student, mode=[("kd_loss", mode)])
    mtd_megatron.adjust_distillation_model_for_mcore(model, config)
    _keep_logits_for_the_kd_loss(model)
    return model


def _criteria(
    student: GPTModel, teacher: GPTModel, distillation: DistillationRecipe, seed: int
) -> dict[tuple[str, str], torch.nn.Module]:
    if not student.post_process:
        return {}
    criteria: dict[tuple[str, str], torch.nn.Module] = {
        _OUTPUT_LAYERS: LogitsLoss(student.config, divergence_of(distillation))
    }
    with torch.random.fork_rng(devices=[]):
        # The same projection on every layout; the GPU's generator, not forked, stays as it is.
        torch.default_generator.manual_seed(seed)
        # one that all pairs share
        projection = mtd_megatron.ProjectionLayer(student.config, teacher.config)
    for student_layer, teacher_layer, *kind in distillation.intermediate_layer_pairs:
        loss = _INTERMEDIATE_LOSSES[kind[0] if kind else "cosine"]
        names = _on_this_stage(student, student_layer), _on_this_stage(teacher, teacher_layer)
        criteria[names] = loss(student.config, projection_layer=projection)
    return criteria


def _on_this_stage(model: GPTModel, name: str) -> str:
    """The name of a submodule on this pipeline stage, where layers count from 0 again."""
    layer = re.match(r"decoder\.layers\.(\d+)", name)
    local = name
    if layer:
        number = int(layer[1]) - get_transformer_layer_offset(model.config)
        if number < 0:
            raise ValueError(
                f"intermediate_layer_pairs: {name!r} is not on the last of "
                f"{model.config.pipeline_model_parallel_size} pipeline stages, which holds layers "
                f"{int(layer[1]) - number} to {model.config.num_layers - 1}: only there are losses "
                "computed; pair later layers, or use fewer stages"
            )
        local = f"decoder.layers.{number}{name[layer.end() :]}"
    try:
        model.get_submodule(local)
    except AttributeError as error:
        raise ValueError(f"intermediate_layer_pairs: no layer {name!r}: {error}") from error
    return local


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
