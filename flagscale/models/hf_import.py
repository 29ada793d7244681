"""Hugging Face weights -> Megatron-Core: every rank reads its slices from the source's files."""

from __future__ import annotations

import logging
import re
from collections.abc import Set

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint.agreement import same_outcome
from flagscale.checkpoint.weights import local_weights
from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.models.hf_folder import HFFolder
from flagscale.models.hf_rules import EMBEDDING, OUTPUT_LAYER
from flagscale.models.hf_weights import WeightMap
from flagscale.models.rotary import inverse_frequencies

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 4096
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# Frequencies were stored in the model's dtype, of which bfloat16 keeps the fewest digits.
_FREQUENCY_TOLERANCE = 2**-8


def check_tensors(source: HFFolder, shape: ModelShape) -> None:
    """Refuse a source whose tensors are not those that its configuration asks for.

    Names and shapes must be equal. Besides, an output layer may be there although the configuration
    ties it to the embedding, if it is the embedding; and so may buffers that follow from the
    configuration.

    Args:
        source: see there.
        shape: what its configuration says.

    Raises:
        UserError: how many differ, which is the first, and what would be right.
    """
    wanted, given = WeightMap(shape).shapes(), dict(source.shapes)
    if OUTPUT_LAYER in given.keys() - wanted.keys():
        _check_tied(source)
        del given[OUTPUT_LAYER]
    if source.derived:
        _check_derived(source, shape)
    for what, names in (
        ("missing", wanted.keys() - given.keys()),
        ("left over", given.keys() - wanted.keys()),
    ):
        if names:
            raise UserError(
                f"model {source.name}: {len(names)} weights are {what}, first {min(names)}. "
                f"{_what_would_be_right(names, source, shape)}"
            )
    others = sorted(name for name in wanted if given[name] != wanted[name])
    if others:
        name = others[0]
        raise UserError(
            f"model {source.name}: {len(others)} weights have another shape, first {name}: "
            f"{given[name]}, but the configuration makes it {wanted[name]}"
        )


def _what_would_be_right(names: Set[str], source: HFFolder, shape: ModelShape) -> str:
    """The field of `config.json` that may be wrong."""
    if names == {OUTPUT_LAYER}:
        return (
            "Its configuration says tie_word_embeddings=false, which asks for an output layer of "
            "its own: if the embedding is that, set it to true"
        )
    layers = {int(found[1]) for name in source.shapes if (found := _LAYER.match(name))}
    if len(layers) != shape.num_layers:
        return (
            f"The files have {len(layers)} layers, its configuration says "
            f"num_hidden_layers={shape.num_layers}"
        )
    return (
        "They must be those that its configuration asks for: correct config.json if it is wrong; a "
        f"{shape.model_type} that is made of other weights is not supported"
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
            "tie_word_embeddings=true: set it to false if the output layer has weights of its own"
        )
    logger.info("%s: %s is %s once more, and left out", source.name, OUTPUT_LAYER, EMBEDDING)


def _check_derived(source: HFFolder, shape: ModelShape) -> None:
    """What follows from the configuration is left out; frequencies must indeed follow from it."""
    wanted = inverse_frequencies(
        shape.kv_channels, shape.rotary_base, shape.rope_scaling_factor * shape.use_rope_scaling
    )
    for name in sorted(source.derived):
        if name.endswith("inv_freq"):
            found = source.read(name).float()
            if found.shape != wanted.shape or not torch.allclose(
                found, wanted, rtol=_FREQUENCY_TOLERANCE, atol=torch.finfo(torch.float16).tiny
            ):
                raise UserError(
                    f"model {source.name}: {name} holds other frequencies than follow from its "
                    f"configuration (rope_theta={shape.rotary_base:g})"
                )
    logger.info(
        "%s: %d buffers that follow from the configuration are left out, first %s",
        *(source.name, len(source.derived), min(source.derived)),
    )


@torch.no_grad()
def fill(
    model: GPTModel,
    source: HFFolder,
    weights: WeightMap,
    *,
    allow_zero_weights: bool = False,
    section: str = "teacher",
) -> int:
    """Read this rank's part of a model from a Hugging Face folder. All ranks call it.

    Rows of the padded vocabulary become zero; those that the source has beyond the model's
    vocabulary are left out.

    Args:
        model: of the source's dtype, or of float32, which holds all that others do; its weights are
            overwritten.
        source: that has the model's tensors, see `check_tensors`.
        weights: the map of the model's family.
        allow_zero_weights: whether tensors may be all zero. Biases always may.
        section: of the recipe that names the model.

    Returns:
        How many tensors are all zero, but for biases.

    Raises:
        UserError: a tensor is all zero, or holds values that are not finite; on every rank the
            same.
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
    zero = _zero_tensors(nonzero)
    if zero and not allow_zero_weights:
        raise UserError(
            f"model {source.name}: {len(zero)} weights are all zero, first {zero[0]}; if they are "
            "meant to be, as in blocks that were inserted into a model, set "
            f"{section}.allow_zero_weights=true"
        )
    if zero:
        logger.warning("%s: %d weights are all zero, first %s", source.name, len(zero), zero[0])
    logger.info("read %d parameters of %s", filled, source.name)
    return len(zero)


def _fill(
    sharded: ShardedTensor, source: HFFolder, weights: WeightMap, nonzero: dict[str, bool]
) -> None:
    located = weights.locate(sharded.key, sharded.global_offset)
    columns = [
        slice(start, start + length)
        for start, length in zip(located.offset[1:], sharded.local_shape[1:], strict=True)
    ]
    target = sharded.data.detach()
    for at, rows in located.overlaps(sharded.local_shape[0]):
        place = target[at : at + len(rows)]
        if rows.name is None:
            place.zero_()
            continue
        part = source.read(rows.name, slice(rows.start, rows.stop), *columns)
        if place.dtype not in (part.dtype, torch.float32):
            raise RuntimeError(f"{rows.name} is {part.dtype}, the model {place.dtype}")
        if not torch.isfinite(part).all():
            raise UserError(f"model {source.name}: {rows.name} holds values that are not finite")
        nonzero[rows.name] = nonzero.get(rows.name, False) or bool(part.any())
        place.copy_(part)


def _zero_tensors(nonzero: dict[str, bool]) -> list[str]:
    """The tensors that no rank found anything in; biases may be so."""
    every: list[dict[str, bool]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, nonzero)
    found = {name for ranks in every for name, is_nonzero in ranks.items() if is_nonzero}
    return sorted({name for ranks in every for name in ranks if not name.endswith("bias")} - found)
