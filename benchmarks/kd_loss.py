"""The divergences against ModelOpt's stock losses: time, memory, error, side by side.

    make bench      # or: python benchmarks/kd_loss.py --rows 512 --vocabulary 49152

Each case runs in a fresh process, forward and backward, on the GPU where there is one. The floor
is one copy of the student's logits and their gradient: no loss can do with less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args

import torch

from flagscale.megatron import platform
from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.divergences.reference import reference_gradient
from flagscale.recipe import DistillationRecipe

DIVERGENCES = get_args(DistillationRecipe.model_fields["divergence"].annotation)
STOCK = ("ModelOpt LogitsKLLoss", "ModelOpt TopKLogitsKLLoss")
CASES = ("floor", *STOCK, *DIVERGENCES)
TOP_K = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def loss_function(case: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Student and teacher logits [N, V] -> summed loss."""
    if case == "floor":
        return lambda student, teacher: student.sum()
    if case in DIVERGENCES:
        divergence = divergence_of(DistillationRecipe(divergence=case))
        return lambda student, teacher: divergence(student, teacher).sum()
    return stock_loss(case)


def stock_loss(case: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """ModelOpt's, which wants [s, b, V] and the output layer's bias."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss

    config = SimpleNamespace(tensor_model_parallel_size=1)
    stock = LogitsKLLoss(config) if case == STOCK[0] else TopKLogitsKLLoss(config, top_k=TOP_K)
    return lambda student, teacher: stock(
        (student.unsqueeze(1), None), (teacher.unsqueeze(1), None)
    )[0].sum()


def measure(case: str, rows: int, vocabulary: int, dtype: torch.dtype, repeat: int) -> dict:
    """One case.

    Returns:
        Medians of the clock's seconds and of all threads' processor time, extra MiB beyond the
        inputs, the gradient's error.
    """
    device = platform.device()
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        (3 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype) for _ in range(2)
    )
    student.requires_grad_()
    loss_of = loss_function(case)
    (loss_of(student[:1] * 1.0, teacher[:1])).backward()
    student.grad = None
    seconds, processor = [], []
    before = memory()
    for _ in range(repeat):
        logits = student * 1.0  # as an output layer would give them; ours overwrites them
        synchronise()
        start, start_of_processor = time.perf_counter(), time.process_time()
        loss_of(logits, teacher).backward()
        synchronise()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_of_processor)
        gradient, student.grad = student.grad, None
    extra = memory() - before
    return {
        "seconds": statistics.median(seconds),
        "processor": statistics.median(processor),
        "extra_mib": extra,
        "error": gradient_error(case, student, teacher, gradient),
    }


def gradient_error(
    case: str, student: torch.Tensor, teacher: torch.Tensor, gradient: torch.Tensor
) -> float | None:
    """Against float64, over the first rows, relative to the norm."""
    if case not in (*DIVERGENCES, STOCK[0]):
        return None  # renormalised top-k is no divergence of the two models
    recipe = DistillationRecipe(divergence=case if case in DIVERGENCES else "forward_kl")
    part = slice(0, 16)
    exact = reference_gradient(student[part], teacher[part], recipe)
    return ((gradient[part].double() - exact).norm() / exact.norm()).item()


def synchronise() -> None:
    """Wait for the GPU."""
    if platform.HAS_GPU:
        torch.cuda.synchronize()


def memory() -> float:
    """Peak MiB of this process (CPU) or of the device."""
    if platform.HAS_GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure all cases and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        dtype = DTYPES[options.dtype]
        result = measure(options.case, options.rows, options.vocabulary, dtype, options.repeat)
        print(json.dumps(result))
        return
    device = torch.cuda.get_device_name() if platform.HAS_GPU else f"CPU, {options.threads} threads"
    print(f"{options.rows} x {options.vocabulary} {options.dtype} logits, {device}\n")
    print("| loss | forward + backward | processor time | extra memory | gradient error |")
    print("|---|---:|---:|---:|---:|")
    for case in CASES:
        command = [sys.executable, *sys.argv, "--case", case]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
        result = json.loads(output.splitlines()[-1])
        error = "-" if result["error"] is None else f"{result['error']:.1e}"
        times = f"{1000 * result['seconds']:.0f} ms | {1000 * result['processor']:.0f} ms"
        print(f"| {case} | {times} | {result['extra_mib']:.0f} MiB | {error} |")


if __name__ == "__main__":
    main()
