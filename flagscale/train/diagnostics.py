"""Where a step's time goes: Megatron-Core's timers and its straggler detector."""

from __future__ import annotations

import logging

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.global_vars import get_timers
from flagscale.train.train_gpt import stimer

logger = logging.getLogger(__name__)

_DETECTOR_LOGGER = "megatron.core.utils"


class Diagnostics:
    """Tells, now and then, which part of a step and which rank takes how long."""

    def __init__(self, args: Arguments, chunks: list[GPTModel]) -> None:
        """Start the straggler detector, if it is asked for. All ranks call it.

        Args:
            args: `timing_log_level` and `log_straggler` say what is wanted.
            chunks: this rank's part of the model; its size makes speed of time.

        Raises:
            UserError: the straggler detector was asked for without a GPU.
        """
        self._args = args
        sizes = args.parallelism
        # Of the whole model, about: the detector divides by the number of ranks.
        self._parameters = (
            sum(p.numel() for chunk in chunks for p in chunk.parameters())
            * sizes.tensor_model_parallel_size
            * sizes.pipeline_model_parallel_size
        )
        if args.log_straggler:
            if not platform.HAS_GPU:
                raise UserError(
                    "training.log_straggler=true: it measures GPUs, and this machine has none"
                )
            # Always the one instance: making another, though it is a singleton, resets it.
            stimer.configure(
                torch.distributed.get_world_size(),
                torch.distributed.get_rank(),
                amp=1.0,  # the operations that `report` tells are those of what is timed
                enabled=True,
            )
            logging.getLogger(_DETECTOR_LOGGER).setLevel(logging.INFO)

    def report(self, steps: int) -> None:
        """Log what was measured in the last `steps` steps. All ranks call it."""
        if self._args.timing_log_level > 0 and steps:
            text = get_timers().get_all_timers_string(normalizer=steps)
            if text:
                logger.info("time a step, in ms:%s", text.split(":", 1)[1])
        if self._args.log_straggler and steps:
            tokens = steps * self._args.global_batch_size * self._args.seq_length
            # Forward passes alone are timed: 2 operations a parameter and token.
            stimer.report(2.0 * self._parameters * tokens, steps)
