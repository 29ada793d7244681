"""What the switches of section `training` that are about speed come to on this machine."""

from __future__ import annotations

from typing import Any

import torch

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import TrainingRecipe


def resolved(
    training: TrainingRecipe, shape: ModelShape, *, distilled: bool = False
) -> TrainingRecipe:
    """The section with every switch on or off.

    With `auto`, kernels of transformer-engine are on where its layers are used and the model allows
    them, overlap of communication on a GPU. On a CPU gradients are accumulated in place; nothing
    else is to be gained there.

    Args:
        training: the recipe's section; one that is resolved already comes back as it is.
        shape: of the model that is trained.
        distilled: a teacher's logits are compared with the student's.

    Raises:
        UserError: a switch is on that this machine or model cannot honour.
    """
    plain = shape.quantization is None  # quantised layers are Megatron-Core's own
    engine = (
        plain
        and platform.HAS_GPU
        and platform.transformer_impl(training.transformer_impl) == "transformer_engine"
    )
    layers = "transformer-engine's layers, on a GPU"
    sharded = platform.use_distributed_optimizer(training.parallelism.use_distributed_optimizer)
    reduces = _switch(training, "overlap_grad_reduce", on=platform.HAS_GPU)
    latent = shape.architecture.multi_latent_attention
    values: dict[str, Any] = {
        "overlap_grad_reduce": reduces,
        "overlap_param_gather": _switch(
            training,
            "overlap_param_gather",
            on=platform.HAS_GPU and reduces and sharded,
            needs={
                "overlap_grad_reduce=true": reduces,
                "parallelism.use_distributed_optimizer=true": sharded,
            },
        ),
        "tp_comm_overlap": _switch(
            training,
            "tp_comm_overlap",
            # It needs more of a machine than can be asked for before the ranks have started.
            on=False,
            needs={
                layers: engine,
                "precision=bf16": platform.training_dtype(training.precision) == torch.bfloat16,
                "fp8=none": training.fp8 == "none",
                "parallelism.sequence_parallel=true": training.parallelism.sequence_parallel,
                # Megatron-Core switches it off for all layers where it meets one of another kind.
                "plain layers of attention and MLP": _is_plain(shape),
            },
        ),
        "apply_rope_fusion": _switch(
            training,
            "apply_rope_fusion",
            on=engine and not latent,
            needs={layers: engine, "a model without multi_latent_attention": not latent},
        ),
        "cross_entropy_loss_fusion": _switch(
            training,
            "cross_entropy_loss_fusion",
            on=engine and not distilled,
            needs={
                layers: engine,
                # Its gradient takes the place of the logits, which the KD loss reads afterwards.
                "distillation.loss=none": not distilled,
            },
        ),
        "gradient_accumulation_fusion": _switch(
            training,
            "gradient_accumulation_fusion",
            on=plain and (engine or platform.has_gradient_accumulation()),
            needs={
                layers: engine or platform.has_gradient_accumulation(),
                "a student that is not quantised": plain,
            },
        ),
    }
    for name in ("bias_activation_fusion", "bias_dropout_fusion"):
        values[name] = _switch(training, name, on=engine)
    if training.ddp_bucket_size is not None and not reduces:
        raise UserError(
            f"training.ddp_bucket_size={training.ddp_bucket_size} has no effect with "
            "overlap_grad_reduce=false; leave it out, or set overlap_grad_reduce=true"
        )
    return training.model_copy(update=values)


def _is_plain(shape: ModelShape) -> bool:
    """Whether all layers are attention and one MLP, whatever their norms are."""
    norms = {"normalization", "qk_layernorm"}
    return shape.architecture.model_dump(exclude_defaults=True).keys() <= norms


def _switch(
    training: TrainingRecipe, name: str, *, on: bool, needs: dict[str, bool] | None = None
) -> bool:
    """A field's value, or for `auto` whether it is on."""
    given: bool | str = getattr(training, name)
    lacking = [what for what, is_there in (needs or {}).items() if not is_there]
    if given is True and lacking:
        raise UserError(
            f"training.{name}=true needs {' and '.join(lacking)}, but here are {platform.device()} "
            f"and transformer_impl={platform.transformer_impl(training.transformer_impl)}; set it "
            "to auto"
        )
    return on if given == "auto" else bool(given)
