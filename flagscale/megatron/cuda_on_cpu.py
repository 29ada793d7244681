"""The adapter by which Megatron-Core runs where there is no GPU: all its patches are here.

`flagscale.megatron.platform` decides; the rest of the project is written for machines with a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store, distributed_c10d
from torch.overrides import TorchFunctionMode

from flagscale.megatron.onednn import is_onednns, product

_CPU = torch.device("cpu")


class _CudaToCpu(TorchFunctionMode):
    """Redirects tensors that are asked for on a CUDA device to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.matmul and not kwargs and args[1].dim() == 2:
            inputs, weight_io = args  # Megatron-Core's layers hand a weight's transpose
            if is_onednns(inputs, weight_io.t()):
                return product(inputs, weight_io.t())
        if (
            func is torch.nn.functional.embedding
            and len(args) == 2
            and hasattr(args[1], "main_grad")
        ):
            # A batch's tokens are few rows of the vocabulary: the rest of the gradient, which
            # Megatron-Core's wrapper adds to a buffer of its own, is zeros.
            kwargs = {**kwargs, "sparse": True}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimiser sorts parameters by the names of CUDA's tensor types.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(value: object) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


def _with_lists(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """Takes split sizes as tensors: the expert dispatcher makes numpy arrays only off a GPU."""

    def with_lists(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return all_to_all_single(*args, **kwargs)

    return with_lists


class _NoStream:
    """A stream or event of a device on which all work is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: self


class _OnOneDevice(ProcessGroupGloo):
    """A group on the gloo device that all groups of a process share.

    Each group otherwise makes its own, with a thread that wakes up 100 times a second and takes
    10 ms to end; Megatron-Core makes 21 groups.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = _gloo_devices(os.getpid())  # of a fork others: threads stay behind
        options._timeout = timeout
        super().__init__(store, rank, size, options)


@functools.cache
def _gloo_devices(_process: int) -> list[ProcessGroupGloo.Device]:
    """As torch itself chooses them."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if names is None:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]


class _GradientAccumulation:
    """Apex' products that add to a weight's gradient: one buffer and two passes over it less."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        input_nk: torch.Tensor, grad_nm: torch.Tensor, main_grad_mk: torch.Tensor
    ) -> None:
        if input_nk.dtype == main_grad_mk.dtype:
            main_grad_mk.addmm_(grad_nm.t(), input_nk)
        else:
            main_grad_mk += grad_nm.t() @ input_nk

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Map what Megatron-Core wants of CUDA to the CPU; afterwards all is as it was."""
    import megatron.core.tensor_parallel.random as mcore_random
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    # It warns at every step that the CPU's random state changed within a GPU random context.
    logging.getLogger(mcore_random.__name__).setLevel(logging.ERROR)
    cuda: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "Stream": type("Stream", (_NoStream,), {}),
        "Event": type("Event", (_NoStream,), {}),
        "current_stream": lambda device=None: _NoStream(),
        "default_stream": lambda device=None: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    rng: dict[str, Any] = {
        "_get_cuda_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(torch.cuda, cuda))
        stack.enter_context(_replaced(mcore_random, rng))
        accumulation = {
            "fused_weight_gradient_mlp_cuda": _GradientAccumulation,
            "_grad_accum_fusion_available": True,
        }
        stack.enter_context(_replaced(layers, accumulation))
        dispatch = {"all_to_all_single": _with_lists(torch.distributed.all_to_all_single)}
        stack.enter_context(_replaced(torch.distributed, dispatch))
        stack.enter_context(_replaced(distributed_c10d, {"ProcessGroupGloo": _OnOneDevice}))
        if not hasattr(moe_utils, "te_general_gemm"):
            # Megatron-Core 0.16.1 names it without transformer-engine too.
            stack.enter_context(_replaced(moe_utils, {"te_general_gemm": None}))
        if not isinstance(multi_latent_attention.TELinear, type):
            # It asks whether its layers are transformer-engine's, which is not there to be asked.
            stack.enter_context(_replaced(multi_latent_attention, {"HAVE_TE": False}))
        stack.enter_context(_CudaToCpu())
        yield


@contextlib.contextmanager
def _replaced(module: Any, values: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    missing = object()
    before = {name: getattr(module, name, missing) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(module, name)
            else:
                setattr(module, name, value)
