"""Cuts a model to a narrower one by what its channels, heads and experts do on calibration text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.megatron.shape import ModelShape
from flagscale.models.cut_shape import widths
from flagscale.models.megatron import forward
from flagscale.post_training.minitron import Scores, move_weights, prune_width

_MODELOPT_NAMES = {"num_experts": "num_moe_experts"}


def cut_widths(wide: ModelShape, narrow: ModelShape) -> dict[str, int]:
    """The widths that differ, by the recipe's names, as the narrower shape has them."""
    before = widths(wide)
    return {name: size for name, size in widths(narrow).items() if size != before[name]}


def narrow_model(
    wide: GPTModel,
    model: GPTModel,
    sizes: dict[str, int],
    batches: Iterable[torch.Tensor],
) -> Scores:
    """Fill a narrower model from a wider one, which is of no use afterwards. All ranks call it.

    Args:
        wide: this rank's part, as deep as `model`, on a layout of pipeline stages alone.
        model: this rank's part of the model to fill.
        sizes: what is narrower in it (`cut_widths`).
        batches: calibration text: int64 [b, s] each, the same on every rank.

    Returns:
        What was chosen by: see `prune_width`; nothing where nothing is narrower, and all weights
        are the wider model's, in their order.

    Raises:
        UserError: ModelOpt has pruned to other sizes.
    """
    if not sizes:
        move_weights(wide, model)
        return {}

    def run(converted: GPTModel) -> None:
        for tokens_bs in batches:
            forward(converted, tokens_bs)

    renamed = {_MODELOPT_NAMES.get(name, name): size for name, size in sizes.items()}
    scores = prune_width(wide, renamed, run)
    move_weights(wide, model)
    return scores
