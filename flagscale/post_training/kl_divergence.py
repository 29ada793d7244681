"""Forward KL divergence between two sets of logits, with nothing vocabulary-sized held.

For student logits `s`, teacher logits `t` and temperature `T`, a row's loss is
`T^2 * KL(softmax(t / T) || softmax(s / T))` in nats: Hinton et al. (arXiv 1503.02531), whose `T^2`
keeps the gradient's size independent of the temperature. Written with autograd it would hold about
eight [rows, vocabulary] buffers; here rows are worked off in chunks that stay in the cache, and the
gradient overwrites the student's logits, which nothing else needs any more.

Under tensor parallelism each rank holds a slice of the vocabulary. Two collectives on a few floats
a row make the result, on every rank, that of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of one fp32 buffer: 1 MiB, 256 MiB


def forward_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """`T^2 * KL(teacher || student)` of every row, differentiable in the student's logits.

    The student's logits are overwritten by the backward pass. Using them afterwards, a second
    backward pass included, raises torch's error about tensors modified in place.

    Args:
        student_logits: [..., V], V the vocabulary of this rank; any float dtype.
        teacher_logits: the same shape; gets no gradient.
        temperature: above 0; divides both.
        group: the ranks that share the vocabulary; None or of size 1: V is all of it.

    Returns:
        float32 [...], nats, the same on every rank of `group`.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} must have one shape: is the vocabulary the same?"
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    result: torch.Tensor = _ForwardKL.apply(student_logits, teacher_logits, temperature, group)
    return result


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        student, teacher = _rows(student_logits), _rows(teacher_logits)
        # [model, 2, N]: each row's largest logit and the log of its shifted sum of exponentials.
        norms = torch.stack([_normalisers(x, temperature) for x in (student, teacher)])
        if group is not None and group.size() > 1:
            norms = _merge(norms, temperature, group)
        loss = torch.empty_like(norms[0, 0])
        for rows in _chunks(student):
            log_p = _log_softmax(teacher[rows], norms[1, :, rows], temperature)
            log_q = _log_softmax(student[rows], norms[0, :, rows], temperature)
            log_ratio = log_p - log_q
            # sum p log(p/q) - p + q: the same, since both sum to 1, but without the rounding of the
            # two logsumexps, which is as large as the loss itself once the student is close.
            loss[rows] = log_ratio.sub_(1).mul_(log_p.exp_()).add_(log_q.exp_()).sum(-1)
        if group is not None and group.size() > 1:
            dist.all_reduce(loss, group=group)
        ctx.save_for_backward(student_logits, teacher_logits, norms)
        ctx.temperature = temperature
        return loss.mul_(temperature**2).view(student_logits.shape[:-1])

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *grad_outputs: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        student_logits, teacher_logits, norms = ctx.saved_tensors
        # Through detach, not .data: autograd then notices that the logits are gone.
        grad = student_logits.detach()
        student, teacher = _rows(grad), _rows(teacher_logits)
        # d/ds of T^2 KL is T (q - p).
        scale = grad_outputs[0].reshape(-1, 1).float() * ctx.temperature
        for rows in _chunks(student):
            p = _log_softmax(teacher[rows], norms[1, :, rows], ctx.temperature).exp_()
            q = _log_softmax(student[rows], norms[0, :, rows], ctx.temperature).exp_()
            student[rows] = q.sub_(p).mul_(scale[rows])
        return grad, None, None, None


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """[..., V] as [N, V], a view."""
    return logits.view(-1, logits.size(-1))


def _chunks(rows: torch.Tensor) -> Iterator[slice]:
    count, width = rows.shape
    step = max(1, _CHUNK_ELEMENTS.get(rows.device.type, 2**18) // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _normalisers(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 [2, N]: m, the largest logit, and log sum exp((logits - m) / temperature).

    Kept apart because their sum, the logsumexp, would be rounded at the size of the logits.
    """
    result = torch.empty(2, logits.size(0), dtype=torch.float32, device=logits.device)
    for rows in _chunks(logits):
        chunk = logits[rows].float()
        result[0, rows] = largest = chunk.amax(-1)
        result[1, rows] = ((chunk - largest[:, None]).mul_(1 / temperature)).exp_().sum(-1).log_()
    return result


def _merge(norms: torch.Tensor, temperature: float, group: dist.ProcessGroup) -> torch.Tensor:
    """The normalisers [model, 2, N] of the whole vocabulary, from those of each rank's slice."""
    parts = [torch.empty_like(norms) for _ in range(group.size())]
    dist.all_gather(parts, norms.contiguous(), group=group)
    largest, log_sums = torch.stack(parts).unbind(2)
    top = largest.amax(0)
    return torch.stack([top, torch.logsumexp(log_sums + (largest - top) / temperature, 0)], 1)


def _log_softmax(logits: torch.Tensor, norms: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 [N, V] of logits / temperature, given their normalisers [2, N]."""
    shifted = torch.sub(logits, norms[0, :, None])
    return torch.add(-norms[1, :, None], shifted, alpha=1 / temperature)
