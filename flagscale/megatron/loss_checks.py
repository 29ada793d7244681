"""Checks of losses and gradients, through Megatron-Core's rerun state machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

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
    # Read once: every check of a value on a GPU would wait for the GPU.
    loss = loss.detach().cpu()
    if args.check_for_nan_in_loss_and_grad:
        _check_finite(loss, "in local forward loss calculation")
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="spiky loss",
            fatal=False,
        )


def check_gradients(buffers: Sequence[torch.Tensor]) -> None:
    """Look for NaN and infinity in all gradients at once, after the backward pass.

    Megatron-Core looks at each bucket by itself, twice, in the midst of the backward pass.

    Args:
        buffers: gradients of this rank, any shapes.

    Raises:
        RuntimeError: there is one.
    """
    norms = torch.stack([buffer.norm() for buffer in buffers])
    _check_finite(norms.norm().cpu(), "in the norm of the local gradients")


def reruns() -> bool:
    """Whether the rerun state machine computes again what looks wrong."""
    return get_rerun_state_machine().mode != RerunMode.DISABLED


def _check_finite(result: torch.Tensor, where: str) -> None:
    """Let the machine look at a number on the host."""
    machine = get_rerun_state_machine()
    for rejection_func, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
        machine.validate_result(
            result=result,
            rejection_func=rejection_func,
            message=f"found {what} {where}",
            fatal=True,
        )
