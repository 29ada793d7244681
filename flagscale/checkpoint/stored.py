"""A distributed checkpoint's tensors one by one: any part of any of them, without a model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from flagscale.errors import UserError


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
        shape: with the leading axes of what is stacked: layers, experts.
        dtype: that it is stored in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredTensors:
    """What a checkpoint holds, whatever layout wrote it. One rank may read alone.

    Attributes:
        folder: of the checkpoint.
        tensors: by key.
    """

    def __init__(self, folder: Path) -> None:
        """Read what there is.

        Raises:
            UserError: there is no checkpoint, or it is damaged.
        """
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except (OSError, ValueError, EOFError, RuntimeError) as error:
            raise UserError(f"{folder}: the checkpoint cannot be read: {error}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._metadata = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self.tensors = {
            key: Stored(tuple(value.size), value.properties.dtype)
            for key, value in self._metadata.items()
        }

    def read(self, key: str, offset: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """A part of a tensor, in the dtype that it is stored in.

        Args:
            key: of the tensor.
            offset: where the part starts, one number a dimension.
            sizes: how large it is; ditto.

        Raises:
            UserError: there is no such tensor, or no such part of it, or the file is damaged.
        """
        if key not in self._metadata:
            raise UserError(f"{self.folder}: the checkpoint cannot be read: it lacks {key}")
        wanted = ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self._metadata[key], [wanted])
        part = torch.empty(*sizes, dtype=self.tensors[key].dtype)
        if sum(item.lengths.numel() for item in items) != part.numel():
            raise UserError(
                f"{self.folder}: the checkpoint cannot be read: {key} of shape "
                f"{self.tensors[key].shape} has no part of {tuple(sizes)} at {tuple(offset)}"
            )
        try:
            self._reader.read_data(LoadPlan(items), _Into(part)).wait()
        except (OSError, ValueError, EOFError, RuntimeError) as error:
            raise UserError(f"{self.folder}: the checkpoint cannot be read: {error}") from error
        return part


class _Into(LoadPlanner):
    """Tells torch's reader where one tensor's parts go."""

    def __init__(self, part: torch.Tensor) -> None:
        self._part = part

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self._part
        for dimension, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dimension, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It has been written in place."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("only tensors are asked for")

    def set_up_planner(self, *args: object, **kwargs: object) -> None:
        """Nothing: the plan is made already."""

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the plan is made already")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan
