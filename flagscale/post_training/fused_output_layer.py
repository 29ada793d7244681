"""The output layers of student and teacher, fused with the losses (see `linear_divergence`).

While a distillation model computes losses, its two output layers hand on what their logits would be
made from, `DeferredLogits`. ModelOpt's hooks capture those like logits, and where Megatron-Core
asks for the LM loss, both losses are made of them. To everything else losses are what they were,
per token: only the mask must be known in the forward pass. Without labels, and where evaluation is
to be differentiated, the layers give logits as ever.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.gpt_builder import mask_padding
from flagscale.post_training.divergences import Divergence, SparseKL
from flagscale.post_training.linear_divergence import HeadInput, Terms, linear_divergence
from flagscale.post_training.sparse_targets import GivenTargets, SparseRows
from flagscale.post_training.upstream import mtd
from flagscale.recipe import DistillationRecipe

logger = logging.getLogger(__name__)

# ModelOpt's, which keep for the loss what a layer returns.
_CAPTURES = (
    mtd.distillation_model.student_output_capture_fwd_hook,
    mtd.distillation_model.teacher_output_capture_fwd_hook,
)


@dataclass
class DeferredLogits:
    """What an output layer was given, in place of its logits.

    Attributes:
        layer: the output layer.
        hidden_sbh: its input; [s / TP, b, h] under sequence parallelism.
        weight_vh: its own, or the embedding's.
        divergence_sb: float32 [s, b]; of the student, once it is computed.
    """

    layer: ColumnParallelLinear
    hidden_sbh: torch.Tensor
    weight_vh: torch.Tensor
    divergence_sb: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That the logits would have."""
        return self.hidden_sbh.dtype

    def head_input(self) -> HeadInput:
        """Of the whole sequence; its gradient is added up over tensor-parallel ranks."""
        group, hidden_sbh = self.layer.tp_group, self.hidden_sbh
        if self.layer.sequence_parallel:
            hidden_sbh = gather_from_sequence_parallel_region(hidden_sbh, group=group)
        else:
            hidden_sbh = copy_to_tensor_model_parallel_region(hidden_sbh, group=group)
        return HeadInput(hidden_sbh.flatten(0, 1), self.weight_vh, self.layer.tokens)


def fuse_output_layer(
    model: GPTModel, divergence: Divergence | SparseKL, distillation: DistillationRecipe
) -> None:
    """Let a distillation model make its losses without logits, in place, as the recipe wants it.

    Args:
        model: of ModelOpt's, converted in all other respects.
        divergence: of the student's logits from what the teacher gives.
        distillation: says whether, and what else is part of the loss.

    Raises:
        UserError: it is asked for, and an output layer does more than multiply with its weight.
    """
    wanted = distillation.fuse_output_layer
    if not model.post_process or wanted is False or (wanted == "auto" and platform.HAS_GPU):
        return
    reason = _why_not(model)
    if reason is not None:
        if wanted is True:
            raise UserError(
                f"distillation.fuse_output_layer=true: {reason}; set it to auto or false"
            )
        logger.info("the output layers are not fused with the loss: %s", reason)
        return
    fused = _FusedOutputLayer(model, divergence, distillation)
    for layer in _output_layers(model).values():
        layer.forward = partial(fused.output, layer)
    model.forward = MethodType(fused.forward, model)
    model.compute_language_model_loss = MethodType(fused.compute_language_model_loss, model)


def unfuse_output_layer(model: GPTModel) -> None:
    """Undo it on the two output layers; what it set on the model goes with ModelOpt's own."""
    if model.post_process:
        for layer in _output_layers(model).values():
            layer.__dict__.pop("forward", None)


def _output_layers(model: GPTModel) -> dict[str, torch.nn.Module]:
    """The student's, and the teacher's if it has one."""
    layers = {"student": model.output_layer, "teacher": model.teacher_model.output_layer}
    return {whose: one for whose, one in layers.items() if not isinstance(one, GivenTargets)}


def _why_not(model: GPTModel) -> str | None:
    """What an output layer does beside multiplying with its weight; None: nothing."""
    known = Counter([mask_padding, *_CAPTURES])
    for whose, layer in _output_layers(model).items():
        if not _is_plain(layer):
            return f"the {whose}'s output layer is a {type(layer).__name__}"
        if layer.bias is not None:
            return f"the {whose}'s output layer has a bias"
        # Who hooks twice wants logits for something else beside the loss.
        hooks = Counter([*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()])
        if unknown := hooks - known:
            hook = next(iter(unknown))
            return f"the {whose}'s output layer has a hook ({getattr(hook, '__name__', hook)})"
    return None


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether it is Megatron-Core's, or computes the same: ModelOpt's, with quantisers off."""
    quantizers = list(layer.children())
    off = bool(quantizers) and not any(getattr(one, "is_enabled", True) for one in quantizers)
    return type(layer) is ColumnParallelLinear or (isinstance(layer, ColumnParallelLinear) and off)


class _FusedOutputLayer:
    def __init__(
        self,
        model: GPTModel,
        divergence: Divergence | SparseKL,
        distillation: DistillationRecipe,
    ) -> None:
        self._divergence, self._skip_lm_loss = divergence, distillation.skip_lm_loss
        self._kd_loss_scale = distillation.kd_loss_scale
        self._teacher_layer = model.teacher_model.output_layer
        # As ModelOpt left them: functions of the instance.
        self._forward = model.forward
        self._compute_language_model_loss = model.compute_language_model_loss
        self._deferring = False
        self._loss_mask_bs: torch.Tensor | None = None

    def forward(self, model: GPTModel, *inputs: Any, **named: Any) -> torch.Tensor:  # noqa: ANN401
        """The model's; labels and loss mask are named, as `forward_step` names them."""
        differentiable = model.training or not torch.is_grad_enabled()
        with self._deferred(named.get("labels") is not None and differentiable):
            self._loss_mask_bs = named.get("loss_mask")
            result: torch.Tensor = self._forward(*inputs, **named)
        return result

    @contextmanager
    def _deferred(self, deferring: bool) -> Iterator[None]:
        self._deferring = deferring
        try:
            yield
        finally:
            self._deferring, self._loss_mask_bs = False, None

    def output(
        self,
        layer: ColumnParallelLinear,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor | DeferredLogits, torch.Tensor | None]:
        """An output layer's forward pass."""
        if not self._deferring:
            logits: tuple[torch.Tensor, torch.Tensor | None] = type(layer).forward(
                layer, input_, weight, runtime_gather_output
            )
            return logits
        return DeferredLogits(layer, input_, layer.weight if weight is None else weight), None

    def compute_language_model_loss(
        self, model: GPTModel, labels: torch.Tensor, logits: torch.Tensor | DeferredLogits
    ) -> torch.Tensor:
        """The student's LM loss [b, s], or zeros where it is skipped; the divergence beside it."""
        if not isinstance(logits, DeferredLogits):
            loss: torch.Tensor = self._compute_language_model_loss(labels, logits)
            return loss
        # ModelOpt runs the teacher first, and its hook has kept what came of it.
        teacher: DeferredLogits | SparseRows = self._teacher_layer._intermediate_output[0]
        labels_sb = labels.transpose(0, 1)
        mask_bs = torch.ones_like(labels) if self._loss_mask_bs is None else self._loss_mask_bs
        skip = model.training and self._skip_lm_loss
        terms = Terms(
            self._divergence,
            self._kd_loss_scale,
            None if skip else labels_sb.flatten(),
            group=logits.layer.tp_group,
        )
        divergence_n, lm_loss_n = linear_divergence(
            logits.head_input(),
            teacher if isinstance(teacher, SparseRows) else teacher.head_input(),
            terms,
            mask_bs.transpose(0, 1).flatten().float(),
        )
        logits.divergence_sb = divergence_n.view(labels_sb.shape)
        return lm_loss_n.view(labels_sb.shape).transpose(0, 1).contiguous()
