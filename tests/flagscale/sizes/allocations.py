"""Counts the bytes of tensors: exact where the memory of a whole process would be mostly noise."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that operations inside it have made and that still live.

    What a kernel needs beside its outputs, and gives back before it ends, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and args[0].dtype is torch.bfloat16:
            # A CPU without instructions for bf16 takes ten times as long. The copies are not seen.
            result = func(*(factor.float() for factor in args)).bfloat16()
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if not isinstance(value, torch.Tensor) or value.device.type == "meta":
                continue
            if value.layout is torch.strided:  # a sparse tensor's parts are tensors of their own
                self._add(value.untyped_storage())
        return result

    def forget_peak(self) -> None:
        """The peak from here on."""
        self.peak = self.now

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        before = self._known.get(key)
        if before == size:
            return
        if before is None:
            weakref.finalize(storage, self._free, key).atexit = False
        self._known[key] = size
        self.now += size - (before or 0)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)
