"""Cuts a model to a narrower one by what its channels, heads and experts do on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.models.megatron import forward
from flagscale.post_training.minitron import Scores, move_weights, prune_width

_MODELOPT_NAMES = {"num_experts": "num_moe_experts"}


def narrow_model(
    wide: GPTModel,
    build: Callable[[], GPTModel],
    sizes: dict[str, int],
    batches: Iterable[torch.Tensor],
) -> tuple[GPTModel, Scores]:
    """Make a narrower model of a wider one, which is of no use afterwards. All ranks call it.

    Args:
        wide: this rank's part, as deep as the narrower one, on a layout of pipeline stages alone.
        build: makes this rank's part of the narrower one; called when the wider one is pruned.
        sizes: what is narrower in it (`cut_widths`).
        batches: calibration text: int64 [b, s] each, the same on every rank.

    Returns:
        The narrower model, and what was chosen by: see `prune_width`; nothing where nothing is
        narrower, and all weights are the wider model's, in their order.

    Raises:
        UserError: ModelOpt has pruned to other sizes.
    """

    def run(converted: GPTModel) -> None:
        for tokens_bs in batches:
            forward(converted, tokens_bs)

    renamed = {_MODELOPT_NAMES.get(name, name): size for name, size in sizes.items()}
    scores = prune_width(wide, renamed, run) if sizes else {}
    model = build()
    move_weights(wide, model)
    return model, scores
