"""The distillation losses that ModelOpt is given, and how they add up."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from flagscale.post_training.divergences import Divergence, SparseKL
from flagscale.post_training.fused_output_layer import DeferredLogits
from flagscale.post_training.loss_func import CriterionOutput
from flagscale.post_training.sparse_targets import SparseRows
from flagscale.post_training.upstream import mtd, mtd_megatron


class LogitsLoss(mtd_megatron.BaseLoss):
    """A divergence of the student's logits from the teacher's, per token.

    Takes the place of ModelOpt's `LogitsKLLoss`, whose value lacks the `T^2` and whose autograd
    holds about eight vocabulary-sized buffers. ModelOpt looks for `Logits` in the class's name.
    """

    def __init__(self, model_config: TransformerConfig, divergence: Divergence | SparseKL) -> None:
        """Keep what the loss needs to know.

        Args:
            model_config: the student's.
            divergence: of a row of logits from what the teacher gives.
        """
        super().__init__(model_config)
        self._divergence = divergence

    def forward(
        self,
        predictions: tuple[torch.Tensor, torch.Tensor | None],
        targets: tuple[torch.Tensor | SparseRows, torch.Tensor | None],
    ) -> CriterionOutput:
        """Compute the loss of what the two output layers returned.

        Args:
            predictions: the student's logits [s, b, V / TP] (and bias); where a gradient will be
                wanted, they are overwritten. Or `DeferredLogits`.
            targets: the teacher's; or in place of its logits sparse rows, s * b of them.

        Returns:
            ModelOpt's triple: loss [b, s], whether it still has to be summed over tensor-parallel
            ranks (no: it is global), whether its sequence is split over them (no).
        """
        if isinstance(predictions[0], DeferredLogits):
            fused: CriterionOutput = self.post_forward(predictions[0].divergence_sb)
            return fused
        group = parallel_state.get_tensor_model_parallel_group()
        teacher: Any = targets[0]  # what the divergence is of
        loss_sb = self._divergence(predictions[0], teacher, group)
        result: CriterionOutput = self.post_forward(loss_sb)
        return result


class WeightedLossBalancer(mtd.DistillationLossBalancer):
    """Adds the losses up with fixed weights.

    ModelOpt's own balancer rescales the terms to each other's size anew in every micro-batch, which
    is not linear: the sum over micro-batches or ranks is then not the loss of the whole batch, and
    the reported KD loss is no KL. Fixed weights keep both true.
    """

    def __init__(self, skip_lm_loss: bool, kd_loss_scale: float) -> None:
        """Keep the weights.

        Args:
            skip_lm_loss: leave the student's LM loss out of the total.
            kd_loss_scale: of all distillation terms, beside the LM loss.
        """
        super().__init__()
        self.skip_lm_loss = skip_lm_loss
        self._kd_loss_scale = kd_loss_scale

    def forward(self, loss_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Total of the losses that `compute_kd_loss` collected, and of the intermediate terms.

        Args:
            loss_dict: name -> summed loss (0-dim): the student's own, one of a class whose name
                contains `Logits`, and any others, with their weights beside it.

        Returns:
            `kd_loss` (the total) and `logits_loss` (unweighted), 0-dim.
        """
        losses = dict(loss_dict)
        lm_loss = losses.pop(mtd.loss_balancers.STUDENT_LOSS_KEY)
        logits_loss = losses.pop(next(name for name in losses if "Logits" in name))
        total = self._kd_loss_scale * sum(losses.values(), start=logits_loss)
        if not self.skip_lm_loss:
            total = lm_loss + total
        return {"kd_loss": total, "logits_loss": logits_loss}
