"""Mean squared error of the logits: Ba and Caruana, "Do deep nets really need to be deep?" (2014).

arXiv 1312.6184; against KL: Kim et al., arXiv 2105.08919. `sum (s - t)^2 / V`: twice what `T^2 KL`
nears as T grows, and beyond it what a constant added to all of a row's logits does, which no
distribution shows. The temperature has no effect: `T^2` times the error of `s / T` is the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from flagscale.post_training.divergences.divergence import Divergence
from flagscale.post_training.divergences.rows import (
    NO_TOKEN,
    Chunk,
    chunks,
    is_shared,
)


class LogitsMSE(Divergence):
    """`sum (s - t)^2 / V`, over the columns that are tokens in either model."""

    def __init__(self) -> None:
        """Take no temperature."""
        super().__init__()

    def _work(
        self,
        student_nv: torch.Tensor,
        teacher_nv: torch.Tensor,
        group: dist.ProcessGroup | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        sums = torch.empty(2, student_nv.size(0), device=student_nv.device)  # squares, columns
        shared = is_shared(group)
        for chunk in chunks(student_nv, teacher_nv):
            difference = _difference(chunk)
            sums[0, chunk.at] = torch.linalg.vecdot(difference, difference)
            sums[1, chunk.at] = _tokens(chunk)
            if with_gradient and not shared:
                chunk.write(difference.div_(sums[1, chunk.at, None]), 2)
        if is_shared(group):
            dist.all_reduce(sums, group=group)
            if with_gradient:
                for chunk in chunks(student_nv, teacher_nv):
                    chunk.write(_difference(chunk).div_(sums[1, chunk.at, None]), 2)
        return sums[0] / sums[1]


def _tokens(chunk: Chunk) -> torch.Tensor:
    """How many columns are tokens, [n]."""
    larger = torch.maximum(chunk.student, chunk.teacher, out=chunk.buffers[1])
    return (larger > NO_TOKEN).sum(-1)


def _difference(chunk: Chunk) -> torch.Tensor:
    # Limited to what float32 can hold: -inf in both models is no difference, NaN stays one.
    student, teacher = (
        torch.clamp(logits, min=torch.finfo(torch.float32).min, out=buffer)
        for logits, buffer in zip((chunk.student, chunk.teacher), chunk.buffers, strict=False)
    )
    return student.sub_(teacher)
