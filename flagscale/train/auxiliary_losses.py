"""Losses that layers add to the gradient by themselves: experts' balance, multi-token prediction.

Megatron-Core collects their values in trackers of its own; here they become records like others.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, track_moe_metrics
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from flagscale.megatron.arguments import Arguments

_BALANCE = "load_balancing_loss"


def balance_losses(args: Arguments) -> dict[str, float]:
    """`load balancing loss` of the step, the mean over layers. All ranks call it."""
    architecture = args.shape.architecture
    if architecture.num_experts is None or not architecture.moe_aux_loss_coeff:
        return {}
    losses: dict[str, torch.Tensor] = {}
    track_moe_metrics(
        loss_scale=1 / args.num_micro_batches,
        iteration=0,
        total_loss_dict=losses,
        force_initialize=True,
        track_names=[_BALANCE],
        num_layers=args.shape.num_layers,
        moe_layer_freq=architecture.moe_layer_freq,
    )
    return {"load balancing loss": float(losses[_BALANCE])}


def prediction_losses(args: Arguments) -> dict[str, float]:
    """`mtp_1 loss`, ...: each further token's loss, nats a token, the mean over micro-batches.

    Without those whose mean Megatron-Core cannot give, because all of a micro-batch is masked; the
    gradient, of sums, does not suffer. On other pipeline stages than the last there are none.
    """
    if args.shape.architecture.mtp_num_layers is None:
        return {}
    losses: dict[str, torch.Tensor] = {}
    MTPLossLoggingHelper.track_mtp_metrics(
        loss_scale=1 / args.num_micro_batches, iteration=0, writer=None, total_loss_dict=losses
    )
    return {name: float(loss) for name, loss in losses.items() if not loss.isnan()}


def forget_auxiliary_losses() -> None:
    """Leave out of the next step what forward passes without a step have added."""
    clear_aux_losses_tracker()
    if "values" in MTPLossLoggingHelper.tracker:
        MTPLossLoggingHelper.clean_loss_in_tracker()
