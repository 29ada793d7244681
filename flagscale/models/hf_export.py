"""Megatron-Core's checkpoint -> a Hugging Face folder, tensor by tensor and without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from megatron.core.models.gpt import GPTModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from flagscale.artifacts import write_json
from flagscale.checkpoint.stored import StoredTensors
from flagscale.errors import UserError
from flagscale.models.hf_quantized import FP8, Fp8Scales
from flagscale.models.hf_weights import Counterpart, WeightMap

_MAX_SHARD_SIZE = "5GB"
_FILE_NAMES = "model{suffix}.safetensors"
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}


class _Entry(NamedTuple):
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    stored: StoredTensors,
    weights: WeightMap,
    folder: Path,
    dtype: torch.dtype,
    rank: int = 0,
    world_size: int = 1,
    scales: Fp8Scales | None = None,
) -> None:
    """Write safetensors of at most 5 GB each, and an index if they are several.

    Rows of the padded vocabulary are dropped. No more than two of the checkpoint's layers' tensors
    are in memory. Each rank writes some of the files.

    Args:
        stored: the checkpoint.
        weights: the map of the model's family.
        folder: existing folder to write into.
        dtype: of the weights on disk.
        rank: of this process.
        world_size: how many processes share the work.
        scales: of weights to be written in FP8, with their scales, once rounded to `dtype`.

    Raises:
        UserError: the checkpoint is not of the family's model.
    """
    counterparts = weights.counterparts(stored.tensors)
    _check_names(counterparts, stored)
    amaxes = {} if scales is None else scales.by_name(counterparts)
    entries = {
        name: _Entry(_shape(one, stored), FP8 if name in amaxes else dtype)
        for name, one in counterparts.items()
    }
    small = {name: value for one in amaxes.values() for name, value in one.scales().items()}
    entries |= {name: _Entry((), torch.float32) for name in small}
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern=_FILE_NAMES,
        max_shard_size=_MAX_SHARD_SIZE,
    )

    @lru_cache(maxsize=2)  # a layer's keys, output projection, queries and values follow each other
    def whole(key: str, index: tuple[int, ...]) -> torch.Tensor:
        size = stored.tensors[key].shape[len(index) :]
        part = stored.read(key, (*index, *(0 for _ in size)), (*(1 for _ in index), *size))
        return part.view(size)

    def tensor(name: str) -> torch.Tensor:
        if name in small:
            return small[name]
        made = counterparts[name]
        rows = whole(made.key, made.index)
        parts = [rows[at : at + len(part)] for at, part in made.pieces]
        weight = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
        return amaxes[name].quantized(weight) if name in amaxes else weight

    for number, (file_name, names) in enumerate(split.filename_to_tensors.items()):
        if number % world_size == rank:
            # In the order that safetensors' own writer has.
            _write(folder / file_name, {name: entries[name] for name in sorted(names)}, tensor)
    if split.is_sharded and rank == 0:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)


@torch.no_grad()
def round_weights(model: GPTModel, dtype: torch.dtype) -> None:
    """Round every weight to what `dtype` can hold, in place; the model stays in its own dtype.

    An export in bfloat16 must equal the model that has the same rounded weights: comparing it with
    the unrounded one would need a tolerance that hides mistakes.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _shape(made: Counterpart, stored: StoredTensors) -> tuple[int, ...]:
    """Of the Hugging Face tensor; the Megatron-Core tensor must be as the map says."""
    height, *width = stored.tensors[made.key].shape[len(made.index) :]
    if height != made.height:
        raise UserError(
            f"{stored.folder}: the checkpoint's {made.key} has {height} rows, but the model's "
            f"shape makes it {made.height}"
        )
    return (sum(len(part) for _, part in made.pieces), *width)


def _check_names(counterparts: dict[str, Counterpart], stored: StoredTensors) -> None:
    wanted = {made.key for made in counterparts.values()}
    for what, keys in (
        ("lacks", wanted - stored.tensors.keys()),
        ("has, what the family's model has not,", stored.tensors.keys() - wanted),
    ):
        if keys:
            raise UserError(f"{stored.folder}: the checkpoint {what} {min(keys)}")


def _write(
    path: Path,
    entries: dict[str, _Entry],
    tensor: Callable[[str], torch.Tensor],
) -> None:
    """Write a safetensors file without holding it: its writer wants all tensors at once.

    The format (https://huggingface.co/docs/safetensors): the header's length, the header as JSON,
    then the tensors' bytes one after the other.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in entries.items():
        end = at + entry.bytes
        kind = _DTYPES[entry.dtype]
        header[name] = {"dtype": kind, "shape": entry.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in entries:
            flat = tensor(name).contiguous().view(-1)
            stream.write(flat.view(torch.uint8).numpy().data)
