"""During training: whether what is reported of a micro-batch is what it is.

Now and then the losses of a step's first micro-batch are computed a second time, in float64 from
the models' last hidden states, by code that the losses do not share. On every layout: each rank of
the last pipeline stage looks at its own tokens, with the ranks that share its vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model

from flagscale.megatron.arguments import Arguments
from flagscale.post_training.arguments import modelopt_args_enabled
from flagscale.post_training.findings import Finding, failures, fault, of_all_ranks
from flagscale.post_training.float64_layers import check_layers, seen_layers
from flagscale.post_training.preflight import check_losses
from flagscale.post_training.tap import Seen, Tap
from flagscale.recipe import DistillationRecipe

logger = logging.getLogger(__name__)


class AuditError(RuntimeError):
    """A reported figure is not what float64 gives of the same micro-batch."""


class TrainingAudit:
    """Looks at the first step of a process, and at every `interval`-th.

    Args:
        chunks: this rank's chunks of the model, wrapped or not.
        args: that they were built with.
        interval: steps; 0: never.
    """

    def __init__(self, chunks: list[GPTModel], args: Arguments, interval: int) -> None:
        self._model = unwrap_model(chunks[-1])
        self._interval = 0 if args.use_legacy_models else interval
        self._recipe: DistillationRecipe | None = None
        if modelopt_args_enabled(args):
            self._recipe = args.export_kd_cfg or DistillationRecipe()
        self._looked = False

    def due(self, step: int) -> bool:
        """Whether a step, counted from 1, is looked at. The same on every rank."""
        return self._interval > 0 and (not self._looked or step % self._interval == 0)

    @contextmanager
    def look(self, step: int, forward_step: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
        """What the schedule is to call instead, while the body runs the step's micro-batches.

        Afterwards, before the weights change, what was seen is computed anew. All ranks call it.

        Args:
            step: counted from 1.
            forward_step: what it would call.

        Raises:
            AuditError: on all ranks, what is wrong on one.
        """
        if not self.due(step):
            yield forward_step
            return
        self._looked = True
        with Tap(self._model, layers=seen_layers(self._recipe)).open() as tap:
            yield tap.around(forward_step)
        findings = of_all_ranks(self._findings(tap))
        if wrong := failures(findings):
            raise AuditError(
                f"the audit of step {step} failed, which was not taken: {'; '.join(wrong)}"
            )
        if torch.distributed.get_rank() == 0:
            logger.info(
                "audit of step %d: %s",
                step,
                ", ".join(
                    f"{one.check} within {abs(one.figure or 0):.1g} of float64's"
                    for one in findings
                    if one.check.endswith("loss") and one.verdict == "passed"
                ),
            )

    def _findings(self, tap: Tap) -> list[Finding]:
        terms = check_layers(tap, self._recipe, self._model)
        if tap.seen is None:
            return []
        return [*check_losses(tap.seen, self._recipe), *_labels(tap.seen), *terms]


def _labels(seen: Seen) -> list[Finding]:
    """Labels are the next tokens, wherever both stand side by side in one document."""
    if parallel_state.get_context_parallel_world_size() > 1:
        return []  # the next token may be another rank's
    together = seen.positions_bs[:, 1:] == seen.positions_bs[:, :-1] + 1
    together &= seen.mask_bs[:, :-1] > 0
    differ = (seen.labels_bs[:, :-1] != seen.tokens_bs[:, 1:]) & together
    cause = None
    if differ.any():
        cause = f"{int(differ.sum())} of {int(together.sum())} labels are not the next token: they "
        cause += "must be shifted exactly once"
    return [fault("labels", cause, "each is the next token")]
