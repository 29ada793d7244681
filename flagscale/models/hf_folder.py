"""The tensors of a Hugging Face folder, read slice by slice from its safetensors."""

from __future__ import annotations

import json
import math
import re
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
# Buffers that old transformers stored although they follow from the configuration.
_DERIVED = re.compile(r"\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")
_LFS = b"version https://git-lfs"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".safetensors")
_CONVERT = (
    "convert them: transformers' AutoModelForCausalLM.from_pretrained(FOLDER)"
    ".save_pretrained(NEW_FOLDER)"
)


class HFFolder:
    """Shapes and dtypes of all tensors, and their content on demand.

    Attributes:
        path: of the folder.
        name: how the user knows it.
        shapes: of every tensor of the model.
        derived: tensors besides, which follow from the configuration.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Read the index and every file's header.

        Args:
            path: with `model.safetensors`, or shards and their index.
            name: how the user knows it, for messages; default: the path.

        Raises:
            UserError: there are no safetensors, they cannot be read, or they are not what the
                index says.
        """
        self.path = path
        self.name = name or str(path)
        self._file_of: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        with self._readable():
            index = _index(path)
            files = sorted({SAFE_WEIGHTS_NAME} if index is None else set(index.values()))
            self._check_files(files)
            for file_name in files:
                self._read_header(file_name)
        if index is not None:
            self._check_index(index)
        self.shapes = {n: shape for n, shape in self._shapes.items() if not _DERIVED.search(n)}
        self.derived = self._shapes.keys() - self.shapes.keys()

    def dtype(self) -> torch.dtype:
        """What all the model's tensors are stored in.

        Raises:
            UserError: they differ, or it is no dtype that a model trains in.
        """
        first, *others = sorted((name, self._dtypes[name]) for name in self.shapes)
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

    def check_single_file(self) -> None:
        """Refuse a `model.safetensors` that is not what the index beside it says.

        transformers reads that file and not the index; others do the opposite.

        Raises:
            UserError: naming the first tensor that differs.
        """
        path = self.path / SAFE_WEIGHTS_NAME
        if not path.is_file() or SAFE_WEIGHTS_NAME in self._file_of.values():
            return
        with self._readable(), self._open(SAFE_WEIGHTS_NAME) as file:
            differing = set(file.keys()) ^ self._shapes.keys()
            for name in sorted(self._shapes.keys() - differing):
                if not differing and not _are_same(file.get_tensor(name), self.read(name)):
                    differing = {name}
        if differing:
            raise UserError(
                f"model {self.name}: has both {SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}, "
                f"which are two models: they differ in {min(differing)}. Remove the one that is "
                "out of date"
            )

    def _check_files(self, files: list[str]) -> None:
        """Refuse files that are not there, before any is read."""
        missing = [name for name in files if not (self.path / name).is_file()]
        if missing == [SAFE_WEIGHTS_NAME] and not (self.path / SAFE_WEIGHTS_INDEX_NAME).exists():
            others = sorted(p.name for p in self.path.glob("*") if p.suffix in _OTHER_FORMATS)
            found = f"there is {', '.join(others[:3])}, which is not read; " if others else ""
            raise UserError(
                f"model {self.name}: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} "
                f"is there; {found}{_CONVERT}"
            )
        if missing:
            raise UserError(
                f"model {self.name}: {len(missing)} of the {len(files)} files that "
                f"{SAFE_WEIGHTS_INDEX_NAME} names are missing, first {missing[0]}"
            )

    def _read_header(self, file_name: str) -> None:
        with self._open(file_name) as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in self._file_of:
                    raise UserError(
                        f"model {self.name}: {name} is in two files, {self._file_of[name]} and "
                        f"{file_name}"
                    )
                part = file.get_slice(name)
                self._file_of[name] = file_name
                self._shapes[name] = tuple(part.get_shape())
                self._dtypes[name] = part.get_dtype()

    def _check_index(self, index: dict[str, str]) -> None:
        """The files must hold what the index says, and nothing else."""
        moved = sorted(name for name in index if self._file_of.get(name) != index[name])
        if moved:
            raise UserError(
                f"model {self.name}: {len(moved)} tensors are not where {SAFE_WEIGHTS_INDEX_NAME} "
                f"has them, first {moved[0]}, which is not in {index[moved[0]]}"
            )
        surplus = sorted(self._file_of.keys() - index.keys())
        if surplus:
            raise UserError(
                f"model {self.name}: {len(surplus)} tensors of its files are not in "
                f"{SAFE_WEIGHTS_INDEX_NAME}, first {surplus[0]} of {self._file_of[surplus[0]]}"
            )

    def _open(self, file_name: str) -> Any:  # noqa: ANN401 - untyped
        path = self.path / file_name
        try:
            # Mapped pages of a file would count as this process' memory until it is closed.
            return safe_open(path, framework="pt", backend="pread")
        except SafetensorError as error:
            reason = f"{file_name} ({path.stat().st_size} bytes): {error}"
            with path.open("rb") as stream:
                if stream.read(len(_LFS)) == _LFS:
                    reason = f"{file_name} is a pointer of Git LFS, not the weights: git lfs pull"
            raise ValueError(reason) from error

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"model of {self.name} cannot be read: {reason}") from error


def _index(folder: Path) -> dict[str, str] | None:
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    if not path.exists():
        return None
    index: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    return index


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
