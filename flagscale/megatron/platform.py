"""The one place that knows that there may be no GPU.

Megatron-Core allocates on, asks and synchronises a CUDA device everywhere. `runtime` starts a
process the way Megatron-Core expects it (process group, parallel state, seeds, rerun state machine)
and, where there is no GPU, maps what it wants of CUDA to the CPU while it is active: the rest of
the project is written as if every machine had an accelerator.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from flagscale.errors import UserError
from flagscale.recipe import ParallelismRecipe

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Megatron-Core's fused functions would otherwise be compiled with the C++ compiler at the first
    # call, 5 to 15 seconds each, and gain nothing here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

_CPU = torch.device("cpu")
# How long a rank waits for another in a collective. The first one prepares the index of the data
# meanwhile, or hashes the largest file: NCCL's 10 minutes are too few for that.
_TIMEOUT = timedelta(hours=1)
_starts = itertools.count()


def device() -> torch.device:
    """Where models and batches live."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else _CPU


def training_dtype(precision: str) -> torch.dtype:
    """The dtype for the recipe's `precision` (`auto`, `fp32` or `bf16`).

    `auto` is bf16 on a GPU. On a CPU it is fp32 whatever the chip: without AVX512-BF16 or AMX, bf16
    matrix products are about a hundred times slower, and figures should not depend on the chip.
    """
    if precision == "auto":
        return torch.bfloat16 if HAS_GPU else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def transformer_impl(choice: str) -> str:
    """Megatron's `transformer_impl` for the recipe's choice (`auto` takes what the machine has)."""
    if choice != "auto":
        return choice
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return "local"
    return "transformer_engine" if HAS_GPU else "local"


def processes(parallelism: ParallelismRecipe) -> int:
    """How many processes train on this machine: the recipe's number, or one a GPU.

    On a CPU, which has nothing to gain from more, as few as hold the model once.
    """
    if parallelism.processes is not None:
        return parallelism.processes
    if HAS_GPU:
        return torch.cuda.device_count()
    return parallelism.smallest_world_size


def use_distributed_optimizer(choice: bool | None) -> bool:
    """Whether to shard the optimiser's state over data-parallel ranks, for the recipe's choice."""
    return HAS_GPU if choice is None else choice


def has_apex_gradient_accumulation() -> bool:
    """Whether Apex's kernel that adds a weight's gradient to the one before can be used."""
    return HAS_GPU and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def tune_optimizer(optimizer: MegatronOptimizer) -> None:
    """Make torch's AdamW, taken where there is no transformer-engine's, one pass over memory."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for group in one.param_groups:
                group["fused"] = True


@contextlib.contextmanager
def runtime(
    seed: int = 1234,
    parallelism: ParallelismRecipe | None = None,
    rerun_mode: str = "disabled",
) -> Iterator[None]:
    """Start Megatron-Core's process state; take it down on exit.

    World size and rank come from torchrun's environment; without it, this is one process alone.

    Args:
        seed: of weights and dropout.
        parallelism: sizes of the process groups; default: 1 each, all processes data-parallel.
        rerun_mode: of the rerun state machine.

    Raises:
        UserError: the processes cannot be divided so.
    """
    sizes = parallelism or ParallelismRecipe()
    with contextlib.ExitStack() as stack:
        if not HAS_GPU:
            stack.enter_context(_cuda_on_cpu())
        _start_process_group()
        stack.callback(torch.distributed.destroy_process_group)
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.rerun_state_machine import (
            RerunMode,
            destroy_rerun_state_machine,
            initialize_rerun_state_machine,
        )

        try:
            sizes.check_world_size(torch.distributed.get_world_size())
        except ValueError as error:
            raise UserError(str(error)) from error
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor_model_parallel_size,
            pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=sizes.virtual_pipeline_model_parallel_size,
            context_parallel_size=sizes.context_parallel_size,
            expert_model_parallel_size=sizes.expert_model_parallel_size,
            # Each expert is whole on its rank: small matrices gain nothing from being cut.
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=int(_TIMEOUT.total_seconds() / 60),
        )
        stack.callback(parallel_state.destroy_model_parallel)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        with _silent("megatron.core.rerun_state_machine"):  # it announces itself as a warning
            initialize_rerun_state_machine(mode=RerunMode(rerun_mode))
        stack.callback(destroy_rerun_state_machine)
        yield


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    named = logging.getLogger(name)
    level = named.level
    named.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        named.setLevel(level)


def _start_process_group() -> None:
    backend = "nccl" if HAS_GPU else "gloo"
    if "WORLD_SIZE" in os.environ:
        if HAS_GPU:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, world_size = next(torch.distributed.rendezvous("env://"))
        # What an earlier start of this process left in the store must not be taken for this one's.
        store = torch.distributed.PrefixStore(f"start {next(_starts)}", store)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
        )
        return
    # No port to collide on: a lone process needs no rendezvous.
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


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


@contextlib.contextmanager
def _cuda_on_cpu() -> Iterator[None]:
    import megatron.core.tensor_parallel.random as mcore_random
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
        dispatch = {"all_to_all_single": _with_lists(torch.distributed.all_to_all_single)}
        stack.enter_context(_replaced(torch.distributed, dispatch))
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
