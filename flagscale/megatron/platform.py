"""The one place that knows that there may be no GPU.

Megatron-Core allocates on, asks and synchronises a CUDA device everywhere. `runtime` starts a
process the way Megatron-Core expects it (process group, parallel state, seeds, rerun state machine)
and, where there is no GPU, maps what it wants of CUDA to the CPU while it is active: the rest of
the project is written as if every machine had an accelerator.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from flagscale.cores import available_cores
from flagscale.errors import UserError
from flagscale.megatron import energy
from flagscale.megatron.accelerators import check_accelerators, has_transformer_engine
from flagscale.megatron.cuda_on_cpu import cuda_on_cpu
from flagscale.megatron.plain_fp32 import plain_fp32
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
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h


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


def inference_dtype(stored: torch.dtype) -> torch.dtype:
    """What a stored model is run in: bf16 where that is fast, else fp32, as fp16 may overflow."""
    return torch.bfloat16 if HAS_GPU and stored == torch.bfloat16 else torch.float32


def transformer_impl(choice: str) -> str:
    """Megatron's `transformer_impl` for the recipe's choice (`auto` takes what the machine has).

    Raises:
        UserError: transformer-engine is installed but does not import, or is chosen but not there.
            Megatron-Core would go on without it, and say nothing.
    """
    if choice == "local" or not HAS_GPU:
        return choice if choice != "auto" else "local"
    if has_transformer_engine():
        return "transformer_engine"
    if choice == "auto":
        return "local"
    raise UserError(
        "training.transformer_impl=transformer_engine, but transformer-engine is not installed"
    )


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


def has_gradient_accumulation() -> bool:
    """Whether Megatron-Core's own layers can add a weight's gradient to the one before.

    On a GPU that takes Apex' kernel; on a CPU it is `addmm_` (`flagscale.megatron.cuda_on_cpu`).
    """
    return not HAS_GPU or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def keep_heap() -> None:
    """On a CPU, memory that is freed stays with this process: the next step's buffers need it.

    glibc gives large buffers back at once, and each step takes their pages anew from the system,
    one by one: 56,000 a step for SmolLM2-135M, which is 4% of its time. Other C libraries, and
    allocators that were loaded in its place, are left as they are.
    """
    mallopt = None if HAS_GPU else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _scale(
    _: object,
    __: object,
    tensor_lists: Sequence[Sequence[torch.Tensor]],
    scale: torch.Tensor | float,
) -> None:
    """Does what `local_multi_tensor_scale` does, without a buffer in between."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def tune_optimizer(optimizer: MegatronOptimizer) -> None:
    """Fewer passes over memory where there is neither transformer-engine nor Apex.

    torch's AdamW is fused, and gradients are clipped in place: Megatron-Core's own way makes a
    scaled copy of each and copies it back.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale
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
    Matrix products of fp32 tensors are fp32 inside (`flagscale.megatron.plain_fp32`).

    Args:
        seed: of weights and dropout.
        parallelism: sizes of the process groups; default: 1 each, all processes data-parallel.
        rerun_mode: of the rerun state machine.

    Raises:
        UserError: the processes cannot be divided so, or the pod has accelerators that cannot be
            used.
    """
    sizes = parallelism or ParallelismRecipe()
    check_accelerators()
    with contextlib.ExitStack() as stack:
        stack.enter_context(plain_fp32())
        if not HAS_GPU:
            stack.enter_context(cuda_on_cpu())
        _share_cores()
        _start_process_group()
        stack.callback(torch.distributed.destroy_process_group)
        from megatron.core import parallel_state, tensor_parallel

        energy.begin()
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
        stack.callback(_destroy_model_parallel)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        with _silent("megatron.core.rerun_state_machine"):  # it announces itself as a warning
            initialize_rerun_state_machine(mode=RerunMode(rerun_mode))
        stack.callback(destroy_rerun_state_machine)
        yield


def _destroy_model_parallel() -> None:
    """Of every group: Megatron-Core's own function forgets two, each of which has threads."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = None


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    named = logging.getLogger(name)
    level = named.level
    named.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        named.setLevel(level)


def _share_cores() -> None:
    """No more threads than the pod's limit feeds; whoever sets OMP_NUM_THREADS knows better."""
    threads = max(1, int(available_cores()))
    if "OMP_NUM_THREADS" not in os.environ and threads < torch.get_num_threads():
        torch.set_num_threads(threads)


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
