"""Forward KL from a teacher of whom some tokens' probabilities are known, and no logits.

Where they are the shares of draws from it (Anshumann et al., "Sparse logit sampling", 2025, arXiv
2503.16870), `q - shares` is, over the draws, on average the gradient of the whole KL; with the
teacher's entropy so is the value that of the KL. It may be below 0 for a few tokens.

Where they are the likeliest tokens' and the rest's mass is known, it is `TopKKL` of the same paper:
the KL of two coarsened distributions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flagscale.post_training.divergences.divergence import differentiable
from flagscale.post_training.divergences.rows import (
    chunk_size,
    exponentials,
    gathered,
    is_shared,
)
from flagscale.post_training.sparse_targets import SparseRows


class SparseKL:
    """`T^2 * KL(p || q)`, `q = softmax(s / T)` the student's, of p what the rows say.

    One collective under tensor parallelism, of three float64 a token.
    """

    def __init__(self, temperature: float = 1.0, top_k: int | None = None) -> None:
        """Keep both.

        Args:
            temperature: that p is of; divides the student's logits.
            top_k: tokens that count one by one where the rows have a tail; None: all of a row.

        Raises:
            ValueError: one of them is out of bounds.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        self.temperature, self.top_k = temperature, top_k

    def __call__(
        self,
        student_logits: torch.Tensor,
        targets: SparseRows,
        group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Every row's divergence, differentiable in the student's logits, which are overwritten.

        Args:
            student_logits: [..., V], N rows, V the vocabulary of this rank; float32 or bfloat16.
            targets: N rows, in the same order.
            group: the ranks that share the vocabulary; None or of size 1: V is all of it.

        Returns:
            float32 [...], nats, the same on every rank of `group`.

        Raises:
            ValueError: they are not as many rows.
        """
        count = student_logits[..., 0].numel()
        if count != len(targets):
            raise ValueError(f"{count} rows of student logits, but {len(targets)} of the teacher's")
        return differentiable(self, student_logits, targets, group)

    @torch.no_grad()
    def loss_and_gradient(
        self,
        student_nv: torch.Tensor,
        targets: SparseRows,
        group: dist.ProcessGroup | None = None,
        *,
        with_gradient: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both at once; see `Divergence.loss_and_gradient`."""
        first = dist.get_rank(group) * student_nv.size(1) if is_shared(group) else 0
        rows = _Rows.of(targets, self.top_k)
        parts, loss_n = [], torch.empty(len(student_nv), device=student_nv.device)
        for chunk in self._chunks(student_nv, rows, first):
            part = chunk.part()
            if is_shared(group):
                parts.append(part)
                continue
            whole = _Whole.of(part[None], chunk.rows)
            loss_n[chunk.at] = whole.loss_n.float()
            if with_gradient:
                chunk.write(whole)
        if is_shared(group) and parts:
            whole = _Whole.of(gathered(torch.cat(parts), group), rows)
            loss_n = whole.loss_n.float()
            for chunk in self._chunks(student_nv, rows, first) if with_gradient else ():
                chunk.part()
                chunk.write(whole[chunk.at])
        return loss_n.mul_(self.temperature**2), student_nv if with_gradient else None

    def _chunks(self, student_nv: torch.Tensor, rows: _Rows, first: int) -> Iterator[_Chunk]:
        count, width = student_nv.shape
        step = chunk_size(count, width, student_nv.device)
        buffer = torch.empty(step, width, device=student_nv.device)
        for start in range(0, count, step):
            at = slice(start, min(start + step, count))
            yield _Chunk(
                at, student_nv[at], rows[at], first, self.temperature, buffer[: at.stop - start]
            )


@dataclass(frozen=True)
class _Rows:
    """Rows as the sums want them, float64: few numbers.

    Attributes:
        tokens_nk: of the whole vocabulary.
        p_nk: 0 where there is no token.
        tail_n: 0 where nothing is known of the other tokens.
        own_n: the part of the KL that does not depend on the student.
        has_tail: whether the other tokens count as one.
    """

    tokens_nk: torch.Tensor
    p_nk: torch.Tensor
    tail_n: torch.Tensor
    own_n: torch.Tensor
    has_tail: bool

    @classmethod
    def of(cls, targets: SparseRows, top_k: int | None) -> _Rows:
        tokens_nk, p_nk = targets.tokens_nk, targets.shares_nk.double()
        if targets.tail_n is None:
            p_nk = p_nk / p_nk.sum(-1, keepdim=True)
            none_n = torch.zeros_like(p_nk[:, 0])
            return cls(tokens_nk, p_nk, none_n, -targets.entropy_n.double(), has_tail=False)
        tail_n = targets.tail_n.double()
        if top_k is not None and top_k < p_nk.size(1):
            tokens_nk, p_nk, rest_n = _likeliest(tokens_nk, p_nk, top_k)
            tail_n = tail_n + rest_n
        # As they are stored, they need not add up to 1 to the digit.
        total_n = p_nk.sum(-1) + tail_n
        p_nk, tail_n = p_nk / total_n[:, None], tail_n / total_n
        own_n = torch.special.xlogy(p_nk, p_nk).sum(-1) + torch.special.xlogy(tail_n, tail_n)
        return cls(tokens_nk, p_nk, tail_n, own_n, has_tail=True)

    def __getitem__(self, at: slice) -> _Rows:
        return _Rows(
            self.tokens_nk[at], self.p_nk[at], self.tail_n[at], self.own_n[at], self.has_tail
        )


class _Chunk:
    """Some rows of this rank's slice of the vocabulary, in a buffer that stays in the cache."""

    def __init__(
        self,
        at: slice,
        student_nv: torch.Tensor,
        rows: _Rows,
        first: int,
        temperature: float,
        buffer: torch.Tensor,
    ) -> None:
        self.at, self.rows = at, rows
        self._out, self._buffer, self._temperature = student_nv, buffer, temperature
        tokens_nk = rows.tokens_nk - first
        self._is_here = (rows.p_nk > 0) & (tokens_nk >= 0) & (tokens_nk < student_nv.size(1))
        # Others than those here stand at some column, where nothing is then added: on a GPU, to
        # pick out the former would mean to wait for how many they are.
        self._columns = tokens_nk.clamp(0, student_nv.size(1) - 1)

    def part(self) -> torch.Tensor:
        """What the other ranks need to know of this slice, float64 [n, 3].

        Of the scaled logits z the logsumexp of the tail's and of the known tokens', and `sum p z`.
        """
        z_nk = self._out.gather(1, self._columns).double() / self._temperature
        self._z_nk = z_nk.masked_fill(~self._is_here, -torch.inf)
        q = self._buffer.copy_(self._out)
        self._add(q, torch.full_like(z_nk, -torch.inf))
        m_n, total_n = exponentials(q, self._temperature, out=q)
        self._m_n = m_n.double() / self._temperature
        p_z = torch.where(self._is_here, self.rows.p_nk * z_nk, 0).sum(-1)
        return torch.stack([self._m_n + total_n.double().log(), self._z_nk.logsumexp(-1), p_z], -1)

    def write(self, whole: _Whole) -> None:
        """Overwrite the logits with the gradient: `q - p`, and in a tail `q (1 - P / Q)`."""
        factor_n = (self._m_n - whole.log_z_n).exp()
        factor_n = factor_n - whole.mass_n * (self._m_n - whole.log_tail_n).exp()
        q = self._buffer.mul_(factor_n.float()[:, None])  # 0 where tokens are known
        self._add(q, (self._z_nk - whole.log_z_n[:, None]).exp() - self.rows.p_nk)
        torch.mul(q, self._temperature, out=self._out)

    def _add(self, to_nv: torch.Tensor, values_nk: torch.Tensor) -> None:
        """To the columns of the known tokens that are here."""
        to_nv.scatter_add_(1, self._columns, torch.where(self._is_here, values_nk, 0).float())


@dataclass(frozen=True)
class _Whole:
    """What is known of the student's whole rows, float64 [n] each.

    Attributes:
        loss_n: the KL.
        log_z_n: the logsumexp of the scaled logits.
        mass_n: what the teacher gives all tokens that are not known; 0 where nobody says.
        log_tail_n: the logsumexp of theirs; where the mass is 0, any number.
    """

    loss_n: torch.Tensor
    log_z_n: torch.Tensor
    mass_n: torch.Tensor
    log_tail_n: torch.Tensor

    @classmethod
    def of(cls, parts_rn3: torch.Tensor, rows: _Rows) -> _Whole:
        """From every rank's `part`."""
        tail, known, p_z = parts_rn3.unbind(-1)
        log_tail_n = tail.logsumexp(0)
        log_z_n = torch.logaddexp(log_tail_n, known.logsumexp(0))
        loss_n = rows.own_n - p_z.sum(0) + rows.p_nk.sum(-1) * log_z_n
        if not rows.has_tail:
            return cls(loss_n, log_z_n, torch.zeros_like(loss_n), log_z_n)
        # Where all tokens are known there is no tail, whatever rounding has left of its mass.
        is_empty = log_tail_n.isneginf()
        mass_n = torch.where(is_empty, 0, rows.tail_n)
        log_tail_n = torch.where(is_empty, log_z_n, log_tail_n)
        return cls(loss_n - mass_n * (log_tail_n - log_z_n), log_z_n, mass_n, log_tail_n)

    def __getitem__(self, at: slice) -> _Whole:
        return _Whole(self.loss_n[at], self.log_z_n[at], self.mass_n[at], self.log_tail_n[at])


def _likeliest(
    tokens_nk: torch.Tensor, p_nk: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k likeliest of each row, and what the others have together; of equal ones the first."""
    order = tokens_nk.argsort(-1)
    tokens_nk, p_nk = tokens_nk.gather(-1, order), p_nk.gather(-1, order)
    order = p_nk.sort(dim=-1, descending=True, stable=True).indices
    tokens_nk, p_nk = tokens_nk.gather(-1, order), p_nk.gather(-1, order)
    return tokens_nk[:, :k], p_nk[:, :k], p_nk[:, k:].sum(-1)
