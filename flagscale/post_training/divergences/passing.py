"""One pass over rows of logits: on a GPU a Triton kernel, on a CPU what a C++ compiler made.

Where neither is at hand, chunks that stay in the cache. All do the same: normalise the rows of this
slice of the vocabulary, or take the whole's normalisers; sum, or take the whole's sums; and write
the gradient over the student's logits. Where one rank has all of the vocabulary, all three happen
in a single pass.
"""

from __future__ import annotations

import importlib.util

import torch

from flagscale.post_training.divergences import cpu_kernel
from flagscale.post_training.divergences.rows import Formula, chunks

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def one_pass(
    divergence: Formula,
    student_nv: torch.Tensor,
    teacher_nv: torch.Tensor,
    norms: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    *,
    with_sums: bool = True,
    with_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go over all rows once.

    Args:
        divergence: of which rows.
        student_nv: [N, V], this rank's slice of the vocabulary.
        teacher_nv: the same.
        norms: float32 [4, N], of the whole vocabulary; default: this slice's are made.
        sums: float32 [S, N], of the whole vocabulary; default: this slice's are made.
        with_sums: False: nobody needs them.
        with_gradient: write it over `student_nv`, times `T`: d/ds of `T^2 D(s / T)`.

    Returns:
        Normalisers [4, N] (`m` and `log z` of the teacher, then of the student) and sums [S, N],
        as given or made.
    """
    run = in_chunks
    if student_nv.is_cuda and _HAS_TRITON:
        from flagscale.post_training.divergences import triton_kernel

        run = triton_kernel.one_pass
    elif cpu_kernel.serves(student_nv, teacher_nv):
        run = cpu_kernel.one_pass
    return run(divergence, student_nv, teacher_nv, norms, sums, with_sums, with_gradient)


def scale_rows(gradient_nv: torch.Tensor, scale_n: torch.Tensor) -> None:
    """Multiply rows in place; most are to be multiplied by 1, and those are not touched."""
    if gradient_nv.is_cuda and _HAS_TRITON:
        from flagscale.post_training.divergences import triton_kernel

        triton_kernel.scale_rows(gradient_nv, scale_n)
    elif gradient_nv.is_cuda:
        gradient_nv.mul_(scale_n[:, None])
    else:
        for row in (scale_n != 1).nonzero().flatten().tolist():
            gradient_nv[row].mul_(scale_n[row])


def in_chunks(
    divergence: Formula,
    student_nv: torch.Tensor,
    teacher_nv: torch.Tensor,
    norms: torch.Tensor | None,
    sums: torch.Tensor | None,
    with_sums: bool,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `one_pass`, by torch's own operations."""
    given, made = norms, []
    if norms is None:
        norms = torch.empty(4, student_nv.size(0), device=student_nv.device)
    for chunk in chunks(student_nv, teacher_nv, divergence.temperature):
        if given is None:
            rows, norms[:, chunk.at] = chunk.normalised()
        else:
            rows = chunk.of_whole(norms[:, chunk.at])
        if sums is None and with_sums:
            made.append(divergence.sums(rows))
        if with_gradient:
            known = made[-1] if sums is None else sums[:, chunk.at]
            chunk.write(divergence.gradient(rows, known), divergence.temperature)
    if sums is None:
        sums = torch.cat(made, 1) if made else norms.new_empty(divergence.number_of_sums, 0)
    return norms, sums
