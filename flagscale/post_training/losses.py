"""The distillation losses that ModelOpt is given, and how they add up."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from flagscale.post_training.divergences import Divergence
from flagscale.post_training.loss_func import CriterionOutput
from flagscale.post_training.upstream import mtd, mtd_megatron


class LogitsLoss(mtd_megatron.BaseLoss):
    """A divergence of the student's logits from the teacher's, per token.

    Takes the place of ModelOpt's `LogitsKLLoss`, whose value lacks the `T^2` and whose autograd
    holds about eight vocabulary-sized buffers. ModelOpt looks for `Logits` in the class's name.
    """

    def __init__(self, model_config: TransformerConfig, divergence: Divergence) -> None:
        """Keep what the loss needs to know.

        Args:
            model_config: the student's.
            divergence: of two rows of logits.
        """
        super().__init__(model_config)
        self._divergence = divergence

    def forward(
        self,
        predictions: tuple[torch.Tensor, torch.Tensor | None],
        targets: tuple[torch.Tensor, torch.Tensor | None],
    ) -> CriterionOutput:
        """Compute the loss of what the two output layers returned.

        Args:
            predictions: the student's logits [s, b, V / TP] (and bias); where a gradient will be
                wanted, they are overwritten.
            targets: the teacher's.

        Returns:
            ModelOpt's triple: loss [b, s], whether it still has to be summed over tensor-parallel
            ranks (no: it is global), whether its sequence is split over them (no).
        """
        student_logits_sbv, teacher_logits_sbv = self.pre_forward(predictions, targets)
        group = parallel_state.get_tensor_model_parallel_group()
        loss_sb = self._divergence(student_logits_sbv, teacher_logits_sbv, group)
        result: CriterionOutput = self.post_forward(loss_sb)
        return result


class _InFloat32(mtd_megatron.BaseLoss):
    """Compares hidden states in fp32, whatever the models compute in."""

    def pre_forward(
        self, predictions: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project the student's hidden states to the teacher's width, and widen both."""
        predictions, targets = super().pre_forward(predictions, targets)
        return predictions.float(), targets.float()


class HiddenStateCosineLoss(_InFloat32, mtd_megatron.HiddenStateCosineLoss):
    """1 - cosine of hidden states, per token: ModelOpt's, in fp32.

    In bf16 a cosine near 1 is a multiple of 2^-8, and the gradient, a difference of nearly equal
    vectors, is mostly rounding: the closer the student, the wronger its direction.
    """


class MSELoss(_InFloat32, mtd_megatron.MSELoss):
    """Mean squared difference of hidden states, per token: ModelOpt's, in fp32."""


class WeightedLossBalancer(mtd.DistillationLossBalancer):
    """Adds the losses up with fixed weights.

    ModelOpt's own balancer rescales the terms to each other's size anew in every micro-batch, which
    is not linear: the sum over micro-batches or ranks is then not the loss of the whole batch, and
    the reported KD loss is no KL. Fixed weights keep both true.
    """

    def __init__(
        self, skip_lm_loss: bool, kd_loss_scale: float, intermediate_loss_scale: float
    ) -> None:
        """Keep the weights.

        Args:
            skip_lm_loss: leave the student's LM loss out of the total.
            kd_loss_scale: of all distillation terms, beside the LM loss.
            intermediate_loss_scale: of the mean of the intermediate terms, beside the logits term.
        """
        super().__init__()
        self.skip_lm_loss = skip_lm_loss
        self._kd_loss_scale = kd_loss_scale
        self._intermediate_loss_scale = intermediate_loss_scale

    def forward(self, loss_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Total of the losses that `compute_kd_loss` collected.

        Args:
            loss_dict: name -> summed loss (0-dim): the student's own, one of a class whose name
                contains `Logits`, and any number of intermediate ones.

        Returns:
            `kd_loss` (the total), `logits_loss` and `intermediate_loss` (unweighted), 0-dim.
        """
        losses = dict(loss_dict)
        lm_loss = losses.pop(mtd.loss_balancers.STUDENT_LOSS_KEY)
        logits_loss = losses.pop(next(name for name in losses if "Logits" in name))
        intermediate_loss = torch.zeros_like(logits_loss)
        if losses:
            intermediate_loss = torch.stack(list(losses.values())).mean()
        total = self._kd_loss_scale * (
            logits_loss + self._intermediate_loss_scale * intermediate_loss
        )
        if not self.skip_lm_loss:
            total = lm_loss + total
        return {
            "kd_loss": total,
            "logits_loss": logits_loss,
            "intermediate_loss": intermediate_loss,
        }
