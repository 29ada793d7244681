"""Checks of every loss, through Megatron-Core's rerun state machine."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine

# Ten times the largest loss seen so far is no noise (Megatron's factor).
SPIKY_LOSS_FACTOR = 10


def check_loss(args: Any, loss: torch.Tensor) -> None:  # noqa: ANN401 - Arguments or a test's
    """Look for NaN, infinity and spikes, as the run's arguments ask for.

    Args:
        args: `check_for_nan_in_loss_and_grad` and `check_for_spiky_loss`.
        loss: 0-dim.

    Raises:
        RuntimeError: the loss is NaN or infinite, and is not computed again to find out why.
    """
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejection_func, message in (
            (torch.isnan, "found NaN in local forward loss calculation"),
            (torch.isinf, "found Inf in local forward loss calculation"),
        ):
            machine.validate_result(
                result=loss, rejection_func=rejection_func, message=message, fatal=True
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="spiky loss",
            fatal=False,
        )
