"""Output layers and distillation loss, apart and fused: time, memory, error, side by side.

    make bench      # or: python benchmarks/output_layer.py --tokens 512 --vocabulary 49152

With `--peers FOLDER`, into which `benchmarks/peers-requirements.txt` was installed, TRL's chunked
divergence (forward KL) and Liger's fused Jensen-Shannon take turns with ours.

Forward and backward from hidden states of student and teacher, on the GPU where there is one. The
floor is the four matrix products alone, in buffers that are there already, of all tokens and of as
many at once as the fused form takes. Cases take turns, so that what else the machine does meets all
of them; each time is the shortest. Where others compute on the same cores, only the processor's
time says anything.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from flagscale.megatron import platform
from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.divergences.reference import reference_gradient
from flagscale.post_training.linear_divergence import (
    HeadInput,
    Terms,
    chunk_rows,
    linear_divergence,
)
from flagscale.recipe import DistillationRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARD = DistillationRecipe()
SYMMETRIC = DistillationRecipe(divergence="jensen_shannon")


class Case(NamedTuple):
    """What is measured, and the divergence that it is of, if any."""

    work: Callable[[], None]
    recipe: DistillationRecipe | None = None


def heads(options: argparse.Namespace) -> tuple[HeadInput, HeadInput]:
    """Student and teacher; their logits spread over some units."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        values = torch.randn(*size, generator=generator) * options.width**-0.25 * 3**0.5
        return values.to(platform.device(), DTYPES[options.dtype])

    student, teacher = (
        HeadInput(
            normal(options.tokens, options.width),
            normal(options.vocabulary, options.width),
            options.vocabulary,
        )
        for _ in range(2)
    )
    for tensor in (student.hidden_nh, student.weight_vh):
        tensor.requires_grad_()
    return student, teacher


def products(student: HeadInput, teacher: HeadInput, rows: int) -> Callable[[], None]:
    """The floor: both models' logits, and the gradients of hidden states and weight.

    Args:
        student: its logits stand for their gradient.
        teacher: has none.
        rows: tokens at once.
    """
    (hidden, weight), (their_hidden, their_weight) = (
        (head.hidden_nh.detach(), head.weight_vh.detach()) for head in (student, teacher)
    )
    logits = torch.empty(2, rows, len(weight), dtype=hidden.dtype, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for start in range(0, len(hidden), rows):
            some = slice(start, min(start + rows, len(hidden)))
            ours, theirs = logits[:, : some.stop - start]
            torch.mm(hidden[some], weight.t(), out=ours)
            torch.mm(their_hidden[some], their_weight.t(), out=theirs)
            torch.mm(ours, weight, out=grad_hidden[some])
            grad_weight.addmm_(ours.t(), hidden[some], beta=float(start > 0))

    return run


def apart(student: HeadInput, teacher: HeadInput) -> None:
    """Logits of both models, and the loss of them."""
    with torch.no_grad():
        targets = teacher.hidden_nh @ teacher.weight_vh.t()
    logits = student.hidden_nh @ student.weight_vh.t()
    divergence_of(FORWARD)(logits, targets).sum().backward()


def fused(student: HeadInput, teacher: HeadInput, recipe: DistillationRecipe) -> None:
    """As training computes it."""
    ones = torch.ones(len(student.hidden_nh), device=student.hidden_nh.device)
    terms = Terms(divergence_of(recipe))
    linear_divergence(student, teacher, terms, ones)[0].sum().backward()


def peers(student: HeadInput, teacher: HeadInput) -> dict[str, Case]:
    """Others' fused losses, with their own defaults."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight = student.hidden_nh, student.weight_vh
    given = teacher.hidden_nh, teacher.weight_vh
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)

    def trl() -> None:
        found, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, *given, None, 0.0)
        found.sum().backward()

    def jensen_shannon() -> None:
        (liger(hidden, weight, *given, labels) * len(hidden)).backward()  # it is a mean

    return {
        "TRL's chunked divergence": Case(trl, FORWARD),
        "Liger's fused JSD": Case(jensen_shannon, SYMMETRIC),
    }


def seconds(work: Callable[[], None], student: HeadInput) -> tuple[float, float]:
    """Of one run: passed, and computed by all threads together."""
    student.hidden_nh.grad = student.weight_vh.grad = None
    synchronise()
    start, computed = time.perf_counter(), time.process_time()
    work()
    synchronise()
    return time.perf_counter() - start, time.process_time() - computed


def synchronise() -> None:
    """Wait for the GPU."""
    if platform.HAS_GPU:
        torch.cuda.synchronize()


def extra_mib(work: Callable[[], None], student: HeadInput) -> float:
    """What torch holds at the most beside inputs and gradients."""
    student.hidden_nh.grad = student.weight_vh.grad = None
    if platform.HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        most = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            work()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
        most = max(itertools.accumulate(changes))
    return (most - student.hidden_nh.nbytes - student.weight_vh.nbytes) / 2**20


def gradient_error(student: HeadInput, teacher: HeadInput, recipe: DistillationRecipe) -> float:
    """Of the weight's gradient after a run, against float64, relative to the norm.

    Columns of the vocabulary at the beginning are compared; it takes all to make them.
    """
    some = slice(0, 64)
    total = torch.zeros(64, student.hidden_nh.size(1), dtype=torch.float64)
    for rows in torch.arange(len(student.hidden_nh)).split(16):
        logits = [
            head.hidden_nh[rows].detach().double().cpu()
            @ head.weight_vh.detach().double().cpu().t()
            for head in (student, teacher)
        ]
        by_logit = reference_gradient(*logits, recipe)
        total += by_logit[:, some].t() @ student.hidden_nh[rows].detach().double().cpu()
    assert student.weight_vh.grad is not None, "a run came before"
    return ((student.weight_vh.grad[some].double().cpu() - total).norm() / total.norm()).item()


def main() -> None:
    """Measure all cases and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=49152, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=576, help="hidden size, default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--peers", type=Path, help="folder with TRL and Liger")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    student, teacher = heads(options)
    rows = chunk_rows(options.tokens, options.vocabulary, 2, platform.device().type)
    cases = {
        "floor: four products": Case(products(student, teacher, options.tokens)),
        f"the same, {rows} tokens at once": Case(products(student, teacher, rows)),
        "apart": Case(lambda: apart(student, teacher), FORWARD),
        "fused": Case(lambda: fused(student, teacher, FORWARD), FORWARD),
    }
    if options.peers:
        sys.path.append(str(options.peers))
        cases["fused, jensen_shannon"] = Case(lambda: fused(student, teacher, SYMMETRIC), SYMMETRIC)
        cases |= peers(student, teacher)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(options.repeat + 1):  # the first warms up
        for name, case in cases.items():
            times[name].append(seconds(case.work, student))
    device = torch.cuda.get_device_name() if platform.HAS_GPU else f"CPU, {options.threads} threads"
    print(
        f"{options.tokens} tokens x {options.vocabulary}, hidden size {options.width}, "
        f"{options.dtype}, {device}\n"
    )
    print(
        "| output layers, loss | forward + backward | processor | extra memory | gradient error |"
    )
    print("|---|---:|---:|---:|---:|")
    for name, case in cases.items():
        cells = [f"{1000 * min(one):.0f} ms" for one in zip(*times[name][1:], strict=True)]
        if case.recipe is None:
            cells += "--"
        else:
            cells.append(f"{extra_mib(case.work, student):.0f} MiB")
            cells.append(f"{gradient_error(student, teacher, case.recipe):.1e}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
