"""Rows of logits, a chunk at a time that stays in the cache, as probabilities; and their ranks.

A softmax is kept as its largest logit `m` and `log z`, the log of the sum of the exponentials that
are shifted by it: their sum, the logsumexp, would be rounded at the size of the logits, which is as
large as the divergence itself once the student is close. For the same reason `log(p / q)` is made
from the difference of the logits, not from that of two rounded logarithms.

Logits of -inf in both models (columns that are no token) count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of one fp32 buffer: 1 MiB, 256 MiB
_SMALLEST = torch.finfo(torch.float32).min


@dataclass
class Rows:
    """Rows of both models as a formula wants them; its buffers may be overwritten.

    Attributes:
        p: float32 [n, V], the teacher's probabilities.
        q: the student's.
        log_ratio: log(p / q); 0 where neither gives any probability.
        spare: a buffer of the same shape.
    """

    p: torch.Tensor
    q: torch.Tensor
    log_ratio: torch.Tensor
    spare: torch.Tensor

    @classmethod
    def of_shares(cls, log_p_nv: torch.Tensor, log_q_nv: torch.Tensor) -> Rows:
        """Of log probabilities of few things, such as the ranks' shares of a vocabulary."""
        p, q = log_p_nv.exp(), log_q_nv.exp()
        return cls(p, q, (log_p_nv - log_q_nv).nan_to_num_(nan=0.0), torch.empty_like(p))


class Chunk:
    """Some rows of both models' logits, with buffers to work in."""

    def __init__(
        self,
        at: slice,
        student_nv: torch.Tensor,
        teacher_nv: torch.Tensor,
        temperature: float,
        buffers: torch.Tensor,
    ) -> None:
        """Take the rows; `buffers` is float32 [6, n, V]."""
        self.at = at
        self._student, self._teacher = student_nv, teacher_nv
        self._scale = 1 / temperature
        *self._buffers, student, teacher = buffers[:, : student_nv.size(0)]
        self.student = _widened(student_nv, student)
        self.teacher = _widened(teacher_nv, teacher)

    def normalised(self) -> tuple[Rows, torch.Tensor]:
        """Rows that sum to 1 over this slice of the vocabulary, and their normalisers [4, n]."""
        p, q, *_ = self._buffers
        m_p, weight_p = self._softmax(self.teacher, p)
        m_q, weight_q = self._softmax(self.student, q)
        # In double, of what p and q were multiplied by: the log ratio fits them exactly.
        log_z_p, log_z_q = -weight_p.double().log(), -weight_q.double().log()
        shift = (m_q.double() - m_p.double()) * self._scale + log_z_q - log_z_p
        norms = torch.stack([m_p, log_z_p.float(), m_q, log_z_q.float()])
        return self._rows(shift), norms

    def of_whole(self, norms: torch.Tensor) -> Rows:
        """This slice's part of rows that sum to 1 over the whole vocabulary."""
        m_p, log_z_p, m_q, log_z_q = norms[..., None]
        p, q, *_ = self._buffers
        torch.sub(self.teacher, m_p, out=p).mul_(self._scale).sub_(log_z_p).exp_()
        torch.sub(self.student, m_q, out=q).mul_(self._scale).sub_(log_z_q).exp_()
        shift = (m_q.double() - m_p.double()) * self._scale + log_z_q.double() - log_z_p.double()
        return self._rows(shift[:, 0])

    def write(self, gradient: torch.Tensor, factor: float) -> None:
        """Overwrite the student's logits with `factor` times the gradient."""
        if self._student.dtype == torch.float32:
            torch.mul(gradient, factor, out=self._student)
        else:
            self._student.copy_(gradient.mul_(factor))

    def _softmax(self, logits: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Into `out`; returns the largest logit and the number that `out` was multiplied by."""
        m = logits.amax(-1).clamp_(min=_SMALLEST)  # a slice may hold nothing but -inf
        torch.sub(logits, m[:, None], out=out)
        if self._scale != 1:
            out.mul_(self._scale)
        weight = out.exp_().sum(-1).reciprocal_()
        # The sum is 0 only where there is nothing to multiply.
        out.mul_(weight.clamp(max=1)[:, None])
        return m, weight

    def _rows(self, shift: torch.Tensor) -> Rows:
        p, q, log_ratio, spare = self._buffers
        torch.sub(self.teacher, self.student, out=log_ratio)
        if self._scale != 1:
            log_ratio.mul_(self._scale)
        log_ratio.add_(shift.float()[:, None]).nan_to_num_(nan=0.0)
        return Rows(p, q, log_ratio, spare)


def chunks(
    student_nv: torch.Tensor, teacher_nv: torch.Tensor, temperature: float
) -> Iterator[Chunk]:
    """All rows, some at a time; their buffers are the same ones."""
    count, width = student_nv.shape
    step = max(1, _CHUNK_ELEMENTS.get(student_nv.device.type, 2**18) // max(1, width))
    buffers = torch.empty(6, min(step, count), width, device=student_nv.device)
    for start in range(0, count, step):
        at = slice(start, min(start + step, count))
        yield Chunk(at, student_nv[at], teacher_nv[at], temperature, buffers)


def gathered(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[...] of every rank, [ranks, ...]: one collective."""
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.stack(parts)


def merged(norms_r4n: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalisers of the whole vocabulary, from those of each rank's slice.

    Returns:
        [4, N], and the log of each rank's share of both distributions, [2, ranks, N].
    """
    m, log_z = norms_r4n[:, 0::2], norms_r4n[:, 1::2]  # [ranks, 2, N], teacher's and student's
    top = m.amax(0)
    log_shares = log_z + (m - top) / temperature
    total = torch.logsumexp(log_shares, 0)
    norms = torch.stack([top[0], total[0], top[1], total[1]])
    return norms, (log_shares - total).transpose(0, 1)


def _widened(logits: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float32 else buffer.copy_(logits)
