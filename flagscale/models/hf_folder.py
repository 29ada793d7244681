"""The tensors of a Hugging Face folder, read slice by slice from its safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from flagscale.errors import UserError

# safetensors' names of what a model may be stored in.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HFFolder:
    """Shapes and dtypes of all tensors, and their content on demand.

    Attributes:
        path: of the folder.
        name: how the user knows it.
        shapes: of every tensor.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Read the index and every file's header.

        Args:
            path: with `model.safetensors`, or shards and their index.
            name: how the user knows it, for messages; default: the path.

        Raises:
            UserError: there are no safetensors, or they cannot be read.
        """
        self.path = path
        self.name = name or str(path)
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        with self._readable():
            self._read_headers()

    def dtype(self) -> torch.dtype:
        """What all tensors are stored in.

        Raises:
            UserError: they differ, or it is no dtype that a model trains in.
        """
        first, *others = sorted(self._dtypes.items())
        for name, dtype in (first, *others):
            if dtype not in _DTYPES:
                raise UserError(
                    f"model {self.name}: {name} is stored in {dtype}, which is not supported; "
                    f"supported: {', '.join(_DTYPES)}"
                )
            if dtype != first[1]:
                raise UserError(
                    f"model {self.name}: {name} is stored in {dtype}, but {first[0]} in "
                    f"{first[1]}: give a model in one dtype"
                )
        return _DTYPES[first[1]]

    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        """A part of a tensor, and nothing else, in the dtype that it is stored in.

        Args:
            name: of the tensor.
            slices: of its dimensions; default: whole.

        Raises:
            UserError: it cannot be read.
        """
        with self._readable(), self._open(self._file_of[name]) as file:
            tensor: torch.Tensor = file.get_slice(name)[slices or (slice(None),)]
            return tensor

    def _read_headers(self) -> None:
        index = self.path / SAFE_WEIGHTS_INDEX_NAME
        if index.exists():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(places.values()))
        elif (self.path / SAFE_WEIGHTS_NAME).exists():
            places, files = None, [SAFE_WEIGHTS_NAME]
        else:
            raise UserError(
                f"model {self.name}: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} "
                "is there; write it with transformers' save_pretrained"
            )
        for file_name in files:
            with self._open(file_name) as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    if places is None or places.get(name) == file_name:
                        part = file.get_slice(name)
                        self._file_of[name] = file_name
                        self.shapes[name] = tuple(part.get_shape())
                        self._dtypes[name] = part.get_dtype()
        if places is not None and places.keys() != self._file_of.keys():
            lacking = min(places.keys() - self._file_of.keys())
            raise UserError(
                f"model {self.name}: {lacking} is not in {places[lacking]}, where "
                f"{SAFE_WEIGHTS_INDEX_NAME} has it"
            )

    def _open(self, file_name: str) -> Any:  # noqa: ANN401 - untyped
        # Mapped pages of a file would count as this process' memory until it is closed.
        return safe_open(self.path / file_name, framework="pt", backend="pread")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"model of {self.name} cannot be read: {reason}") from error
