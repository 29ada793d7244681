"""Hugging Face weights -> Megatron-Core: every rank reads its slices from the source's files."""

from __future__ import annotations

import logging
import re

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint.agreement import same_outcome
from flagscale.checkpoint.weights import local_weights
from flagscale.errors import UserError
from flagscale.models.hf_folder import HFFolder
from flagscale.models.hf_rules import EMBEDDING, OUTPUT_LAYER
from flagscale.models.hf_weights import WeightMap

logger = logging.getLogger(__name__)

# Old transformers stored what follows from the configuration.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
_ROWS_AT_ONCE = 4096


def check_names(source: HFFolder, weights: WeightMap) -> None:
    """Refuse a source that lacks a tensor of the model, or has one that the model does not.

    Raises:
        UserError: naming the first.
    """
    wanted = weights.names()
    given = {name for name in source.shapes if not _DERIVED.search(name)}
    if OUTPUT_LAYER in given - wanted:
        _check_tied(source)
        given.remove(OUTPUT_LAYER)
    for what, names in (("missing", wanted - given), ("left over", given - wanted)):
        if names:
            raise UserError(
                f"model {source.name}: {len(names)} weights are {what}, first {min(names)}"
            )


def _check_tied(source: HFFolder) -> None:
    """An output layer beside a configuration that ties it must be the embedding once more."""
    equal = source.shapes.get(EMBEDDING) == source.shapes[OUTPUT_LAYER]
    height = source.shapes[OUTPUT_LAYER][0]
    for start in range(0, height, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, height))
        equal = equal and torch.equal(source.read(EMBEDDING, rows), source.read(OUTPUT_LAYER, rows))
    if not equal:
        raise UserError(
            f"model {source.name}: {OUTPUT_LAYER} is not {EMBEDDING}, but its configuration says "
            "tie_word_embeddings: set it to false"
        )


@torch.no_grad()
def fill(model: GPTModel, source: HFFolder, weights: WeightMap) -> None:
    """Read this rank's part of a model from a Hugging Face folder. All ranks call it.

    Rows of the padded vocabulary become zero.

    Args:
        model: of the source's dtype; its weights are overwritten.
        source: that has the model's tensors, see `check_names`.
        weights: the map of the model's family.

    Raises:
        UserError: a tensor has another shape, is all zero (a bias may be), or holds values that are
            not finite; on every rank the same.
    """
    nonzero: dict[str, bool] = {}
    filled = 0
    with same_outcome(source.path, "could not be read"):
        for sharded in local_weights(model):
            filled += sharded.data.numel()
            _fill(sharded, source, weights, nonzero)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if filled != parameters:
        raise RuntimeError(f"{filled} of the model's {parameters} parameters were read")
    _check_nonzero(nonzero, source)
    logger.info("read %d parameters of %s", filled, source.name)


def _fill(
    sharded: ShardedTensor, source: HFFolder, weights: WeightMap, nonzero: dict[str, bool]
) -> None:
    located = weights.locate(sharded.key, sharded.global_offset)
    columns = [
        slice(start, start + length)
        for start, length in zip(located.offset[1:], sharded.local_shape[1:], strict=True)
    ]
    width = sharded.global_shape[sharded.prepend_axis_num + 1 :]
    for name, height in located.heights().items():
        if source.shapes[name] != (height, *width):
            raise UserError(
                f"model {source.name}: {name} has the shape {source.shapes[name]}, but the "
                f"configuration makes it {(height, *width)}"
            )
    target = sharded.data.detach()
    for at, rows in located.overlaps(sharded.local_shape[0]):
        place = target[at : at + len(rows)]
        if rows.name is None:
            place.zero_()
            continue
        part = source.read(rows.name, slice(rows.start, rows.stop), *columns)
        if part.dtype != place.dtype:
            raise RuntimeError(f"{rows.name} is {part.dtype}, the model {place.dtype}")
        if not torch.isfinite(part).all():
            raise UserError(f"model {source.name}: {rows.name} holds values that are not finite")
        nonzero[rows.name] = nonzero.get(rows.name, False) or bool(part.any())
        place.copy_(part)


def _check_nonzero(nonzero: dict[str, bool], source: HFFolder) -> None:
    """Refuse a tensor that no rank found anything in."""
    every: list[dict[str, bool]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, nonzero)
    found = {name for ranks in every for name, is_nonzero in ranks.items() if is_nonzero}
    zero = {name for ranks in every for name in ranks if not name.endswith("bias")} - found
    if zero:
        raise UserError(f"model {source.name}: {min(zero)} is all zero")
