# mypy: disallow-untyped-defs=False
# ruff: noqa: ANN001, ANN202, N803 - Triton infers types, and spells a kernel's constants so
"""The pass over rows of logits as a Triton kernel: one program a row, which it reads in blocks.

A row is read once for its normalisers, once for its sums and once for its gradient; what fits the
GPU's cache comes from memory only the first time. The forward KL's gradient needs no sum, so its
sums and gradient share a reading. `triton_formulas` has what each column gives.

Never run on a GPU so far: the arithmetic is tested by Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flagscale.post_training.divergences.rows import Formula
from flagscale.post_training.divergences.triton_formulas import (
    FORWARD_KL,
    KINDS,
    REVERSE_KL,
    excess_and_room,
    gradient_of,
    loss_of,
)


def one_pass(
    divergence: Formula,
    student_nv: torch.Tensor,
    teacher_nv: torch.Tensor,
    norms: torch.Tensor | None,
    sums: torch.Tensor | None,
    with_sums: bool,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `passing.one_pass`."""
    count, width = student_nv.shape
    normalise, add_up = norms is None, sums is None and with_sums
    if norms is None:
        norms = torch.empty(4, count, dtype=torch.float32, device=student_nv.device)
    if sums is None:
        sums = torch.empty(
            divergence.number_of_sums, count, dtype=torch.float32, device=student_nv.device
        )
    block = min(4096, triton.next_power_of_2(width))
    if count:
        _rows_kernel[(count,)](
            student_nv,
            teacher_nv,
            norms,
            sums,
            norms.stride(0),
            sums.stride(0),
            student_nv.stride(0),
            teacher_nv.stride(0),
            width,
            1 / divergence.temperature,
            getattr(divergence, "beta", getattr(divergence, "alpha", 0.0)),
            divergence.temperature,
            KIND=KINDS[type(divergence).__name__],
            NORMALISE=normalise,
            ADD_UP=add_up,
            WRITE=with_gradient,
            BLOCK=block,
            num_warps=8,
        )
    return norms, sums


def scale_rows(gradient_nv: torch.Tensor, scale_n: torch.Tensor) -> None:
    """As `passing.scale_rows`, without the host knowing which rows."""
    count, width = gradient_nv.shape
    if count:
        scale_n = scale_n.float().contiguous()
        stride = gradient_nv.stride(0)
        _scale_kernel[(count,)](gradient_nv, scale_n, stride, width, BLOCK=4096, num_warps=8)


@triton.jit
def _scale_kernel(gradient, scales, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row)
    if scale != 1:
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            part = gradient + row * stride + at
            old = tl.load(part, mask=at < width, other=0).to(tl.float32)
            tl.store(part, (old * scale).to(gradient.dtype.element_ty), mask=at < width)


@triton.jit
def _rows_kernel(
    student,
    teacher,
    norms,
    sums,
    norms_stride,
    sums_stride,
    student_stride,
    teacher_stride,
    width,
    scale,
    weight,
    factor,
    KIND: tl.constexpr,
    NORMALISE: tl.constexpr,
    ADD_UP: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    norms += row
    sums += row
    m_t, log_z_t, m_s, log_z_s = _normalisers(
        student, teacher, norms, norms_stride, width, scale, NORMALISE, BLOCK
    )
    shift = (m_s - m_t) * scale + (log_z_s - log_z_t)

    loss, all_excess, all_room = 0.0, 0.0, 0.0
    # The one gradient that needs no sum is written along.
    write_along: tl.constexpr = WRITE and KIND == FORWARD_KL
    if ADD_UP or write_along:
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            p, q, x = _columns(
                student, teacher, at, width, m_t, log_z_t, m_s, log_z_s, shift, scale
            )
            if ADD_UP:
                excess, room = excess_and_room(p, q, x, weight, KIND)
                loss += tl.sum(loss_of(p, q, x, weight, KIND))
                all_excess += tl.sum(excess)
                all_room += tl.sum(room)
            if write_along:
                _store(student, at, width, (q - p) * factor)
    if ADD_UP:
        _store_sums(sums, sums_stride, loss, all_excess, all_room, KIND)
    elif WRITE:
        loss, all_excess, all_room = _load_sums(sums, sums_stride, KIND)
    if WRITE and KIND != FORWARD_KL:
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            p, q, x = _columns(
                student, teacher, at, width, m_t, log_z_t, m_s, log_z_s, shift, scale
            )
            gradient = gradient_of(p, q, x, weight, loss, all_excess, all_room, KIND)
            _store(student, at, width, gradient * factor)


@triton.jit
def _normalisers(
    student,
    teacher,
    norms,
    norms_stride,
    width,
    scale,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of both models, made and stored, or loaded."""
    if NORMALISE:
        m_t, log_z_t = _normaliser(teacher, width, scale, BLOCK)
        m_s, log_z_s = _normaliser(student, width, scale, BLOCK)
        tl.store(norms, m_t)
        tl.store(norms + norms_stride, log_z_t)
        tl.store(norms + 2 * norms_stride, m_s)
        tl.store(norms + 3 * norms_stride, log_z_s)
    else:
        m_t = tl.load(norms)
        log_z_t = tl.load(norms + norms_stride)
        m_s = tl.load(norms + 2 * norms_stride)
        log_z_s = tl.load(norms + 3 * norms_stride)
    return m_t, log_z_t, m_s, log_z_s


@triton.jit
def _normaliser(logits, width, scale, BLOCK: tl.constexpr):
    """The largest logit, and the log of the sum of the exponentials that are shifted by it."""
    m, total = -3.4028234663852886e38, 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < width, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(m, tl.max(z))
        total = total * tl.exp((m - larger) * scale) + tl.sum(tl.exp((z - larger) * scale))
        m = larger
    return m, tl.log(total)


@triton.jit
def _columns(student, teacher, at, width, m_t, log_z_t, m_s, log_z_s, shift, scale):
    """Probabilities, and the log of their ratio, 0 where neither has any."""
    nothing = -float("inf")
    s = tl.load(student + at, mask=at < width, other=nothing).to(tl.float32)
    t = tl.load(teacher + at, mask=at < width, other=nothing).to(tl.float32)
    p = tl.exp((t - m_t) * scale - log_z_t)
    q = tl.exp((s - m_s) * scale - log_z_s)
    x = (t - s) * scale + shift
    return p, q, tl.where((p == 0) & (q == 0), 0.0, x)


@triton.jit
def _store_sums(sums, stride, loss, excess, room, KIND: tl.constexpr):
    tl.store(sums, loss)
    if KIND != FORWARD_KL and KIND != REVERSE_KL:
        tl.store(sums + stride, excess)
        tl.store(sums + 2 * stride, room)


@triton.jit
def _load_sums(sums, stride, KIND: tl.constexpr):
    loss, excess, room = tl.load(sums), 0.0, 0.0
    if KIND != FORWARD_KL and KIND != REVERSE_KL:
        excess = tl.load(sums + stride)
        room = tl.load(sums + 2 * stride)
    return loss, excess, room


@triton.jit
def _store(student, at, width, gradient):
    tl.store(student + at, gradient.to(student.dtype.element_ty), mask=at < width)
