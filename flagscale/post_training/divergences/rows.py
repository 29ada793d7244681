"""Rows of logits, a chunk at a time that stays in the cache, as probabilities; and their ranks.

A softmax's normaliser is kept as the largest logit `m` and `log z`, the log of the sum of the
exponentials that are shifted by it: their sum, the logsumexp, would be rounded at the size of the
logits, which is as large as the divergence itself once the student is close. For the same reason
`log(p / q)` is made from the difference of the logits, not from that of two rounded logarithms.

Logits of -inf in both models (columns that are no token) count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol, TypeGuard

import torch
import torch.distributed as dist

# A logit below it stands for no token: `gpt_builder` sets those of padding to -10,000.
NO_TOKEN = -9000.0
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # of one fp32 buffer: 1 MiB, 64 MiB
_BUFFERS = 4
_SMALLEST = torch.finfo(torch.float32).min


class Rows:
    """Rows of both models as a formula wants them; what it holds may be overwritten.

    Attributes:
        p: float32 [n, V], the teacher's probabilities.
        q: the student's.
        spare: a buffer of the same shape.
        kept: what a formula's sums found and its gradient wants again; empty: nothing yet.
    """

    def __init__(
        self,
        p: torch.Tensor,
        q: torch.Tensor,
        spare: torch.Tensor,
        log_ratio: Callable[[], torch.Tensor],
    ) -> None:
        """Take them; `log_ratio` is called once it is wanted."""
        self.p, self.q, self.spare = p, q, spare
        self.kept: Sequence[torch.Tensor] = ()
        self._log_ratio = log_ratio

    @cached_property
    def log_ratio(self) -> torch.Tensor:
        """log(p / q); 0 where neither gives any probability, infinite where one does not."""
        return self._log_ratio()

    @classmethod
    def of_shares(cls, log_p_nv: torch.Tensor, log_q_nv: torch.Tensor) -> Rows:
        """Of log probabilities of few things, such as the ranks' shares of a vocabulary."""
        p, q = log_p_nv.exp(), log_q_nv.exp()
        return cls(p, q, torch.empty_like(p), lambda: without_nan(log_p_nv - log_q_nv))


class Formula(Protocol):
    """What of a divergence a pass over rows needs; see `divergence.FDivergence`."""

    temperature: float
    number_of_sums: int

    def sums(self, rows: Rows) -> torch.Tensor:
        """Sums over the columns, [S, n], S the `number_of_sums`."""

    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """By the student's scaled logits, [n, V]."""


class Chunk:
    """Some rows of both models' logits, with buffers to work in.

    Attributes:
        at: which rows.
        student: float32 [n, V], the logits.
        teacher: the same.
        buffers: float32 [4, n, V].
    """

    def __init__(
        self,
        at: slice,
        student_nv: torch.Tensor,
        teacher_nv: torch.Tensor,
        temperature: float,
        buffers: torch.Tensor,
    ) -> None:
        """Take the rows; of `buffers`, [4 or 6, rows, V], the last two are to widen logits in."""
        buffers = buffers[:, : at.stop - at.start]
        self.at, self.buffers = at, buffers[:_BUFFERS]
        self._out = self.student = student_nv[at]
        self.teacher = teacher_nv[at]
        self._temperature = temperature
        if len(buffers) > _BUFFERS:
            self.student = buffers[-2].copy_(self.student)
            self.teacher = buffers[-1].copy_(self.teacher)

    def normalised(self) -> tuple[Rows, torch.Tensor]:
        """Rows that sum to 1 over this slice of the vocabulary, and their normalisers [4, n]."""
        weights, norms = [], []
        for logits, buffer in zip((self.teacher, self.student), self.buffers, strict=False):
            m, total = exponentials(logits, self._temperature, out=buffer)
            weight = total.reciprocal()
            buffer.mul_(weight.clamp(max=1)[:, None])  # infinite where there is nothing to weigh
            weights.append(weight.double().log())  # what p and q were multiplied by, to the digit
            norms += [m, total.log()]
        shift = (norms[2].double() - norms[0].double()) / self._temperature
        return self._rows(shift + weights[0] - weights[1]), torch.stack(norms)

    def of_whole(self, norms: torch.Tensor) -> Rows:
        """This slice's part of rows that sum to 1 over the whole vocabulary."""
        for (m, log_z), logits, buffer in zip(
            norms.view(2, 2, -1, 1), (self.teacher, self.student), self.buffers, strict=False
        ):
            torch.sub(logits, m, out=buffer).div_(self._temperature).sub_(log_z).exp_()
        m_t, log_z_t, m_s, log_z_s = norms.double()
        return self._rows((m_s - m_t) / self._temperature + log_z_s - log_z_t)

    def write(self, gradient: torch.Tensor, factor: float) -> None:
        """Overwrite the student's logits with `factor` times the gradient [n, V]."""
        torch.mul(gradient, factor, out=self._out)

    def _rows(self, shift_n: torch.Tensor) -> Rows:
        p, q, spare, log_ratio = self.buffers

        def ratio() -> torch.Tensor:
            torch.sub(self.teacher, self.student, out=log_ratio)
            if self._temperature != 1:
                log_ratio.div_(self._temperature)
            return without_nan(log_ratio.add_(shift_n.float()[:, None]))

        return Rows(p, q, spare, ratio)


def chunks(
    student_nv: torch.Tensor, teacher_nv: torch.Tensor, temperature: float = 1.0
) -> Iterator[Chunk]:
    """All rows, some at a time; the buffers are the same ones."""
    count, width = student_nv.shape
    step = chunk_size(count, width, student_nv.device)
    wide = student_nv.dtype == teacher_nv.dtype == torch.float32
    number = _BUFFERS if wide else _BUFFERS + 2
    buffers = torch.empty(number, step, width, device=student_nv.device)
    for start in range(0, count, step):
        at = slice(start, min(start + step, count))
        yield Chunk(at, student_nv, teacher_nv, temperature, buffers)


def chunk_size(count: int, width: int, device: torch.device) -> int:
    """Rows a chunk, at least 1: of `count` rows of `width` columns."""
    return max(1, min(count, _CHUNK_ELEMENTS.get(device.type, 2**18) // width))


def exponentials(
    logits: torch.Tensor, temperature: float, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exp((logits - m) / temperature)` into `out`.

    Returns:
        float32 [n] each: m, the largest logit, and the sum.
    """
    m = logits.amax(-1).clamp_(min=_SMALLEST)  # a slice may hold nothing but -inf
    torch.sub(logits, m[:, None], out=out)
    if temperature != 1:
        out.div_(temperature)
    return m, out.exp_().sum(-1)


def is_shared(group: dist.ProcessGroup | None) -> TypeGuard[dist.ProcessGroup]:
    """Whether there are other ranks with a slice of the vocabulary."""
    return group is not None and group.size() > 1


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


def without_nan(difference: torch.Tensor) -> torch.Tensor:
    """0 in place of `-inf - -inf`; in place."""
    return difference.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
