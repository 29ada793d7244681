"""KL over the teacher's k likeliest tokens and one bucket for all others.

The tail's mass is kept, as by the "ghost token" of Anshumann et al., "Sparse logit sampling"
(2025), arXiv 2503.16870: this is the forward KL of two coarsened distributions, at most that of the
whole ones, and equal to it where k is the vocabulary. Top-k KL whose k tokens are renormalised, as
is usual, is no divergence of the two models and teaches the student's tail nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from flagscale.post_training.divergences import cpu_kernel
from flagscale.post_training.divergences.divergence import Divergence
from flagscale.post_training.divergences.rows import (
    Chunk,
    chunks,
    exponentials,
    gathered,
    is_shared,
)


class TopKKL(Divergence):
    """Forward KL, the tokens outside of the teacher's top k taken as one.

    One collective: each rank gives its own k candidates and what the rest of its slice weighs.
    """

    def __init__(self, temperature: float = 1.0, top_k: int = 64) -> None:
        """Keep both.

        Args:
            temperature: divides both models' logits.
            top_k: tokens that count one by one, at least 1; beyond the vocabulary, all of it.

        Raises:
            ValueError: one of them is out of bounds.
        """
        super().__init__(temperature)
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        self.top_k = top_k

    def _work(
        self,
        student_nv: torch.Tensor,
        teacher_nv: torch.Tensor,
        group: dist.ProcessGroup | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        if cpu_kernel.serves(student_nv, teacher_nv):
            return self._compiled(student_nv, teacher_nv, group, with_gradient)
        count, width = teacher_nv.shape
        k = min(self.top_k, width)
        tokens = torch.empty(count, k, dtype=torch.int64, device=student_nv.device)
        parts = torch.empty(count, 4 + 2 * k, device=student_nv.device)
        loss_n = torch.empty(count, device=student_nv.device)
        shared = is_shared(group)
        for chunk in chunks(student_nv, teacher_nv, self.temperature):
            tokens[chunk.at], parts[chunk.at] = self._part(chunk, k)
            if not shared:
                merged = _Merged(parts[None, chunk.at], self.top_k, self.temperature)
                loss_n[chunk.at] = merged.loss_n
                if with_gradient:
                    self._write(chunk, tokens[chunk.at], *merged.gradient(0))
        if is_shared(group):
            merged = _Merged(gathered(parts, group), self.top_k, self.temperature)
            loss_n = merged.loss_n.float()
            if with_gradient:
                factor, at_tokens, log_z = merged.gradient(dist.get_rank(group))
                for chunk in chunks(student_nv, teacher_nv, self.temperature):
                    at = chunk.at
                    self._write(chunk, tokens[at], factor[at], at_tokens[at], log_z[at])
        return loss_n

    def _compiled(
        self,
        student_nv: torch.Tensor,
        teacher_nv: torch.Tensor,
        group: dist.ProcessGroup | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        k = min(self.top_k, teacher_nv.size(1))
        tokens, parts = cpu_kernel.top_k_parts(student_nv, teacher_nv, k, self.temperature)
        everywhere = gathered(parts, group) if is_shared(group) else parts[None]
        merged = _Merged(everywhere, self.top_k, self.temperature)
        if with_gradient:
            own = merged.gradient(dist.get_rank(group) if is_shared(group) else 0)
            cpu_kernel.top_k_write(student_nv, self.temperature, tokens, *own)
        return merged.loss_n.float()

    def _part(self, chunk: Chunk, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This slice's k candidates, [n, k], and what the others need to know of it, [n, 4 + 2k].

        The latter: the tails' normalisers, the teacher's logits and the student's.
        """
        tokens_nk = _likeliest(chunk.teacher, k)
        norms = []
        for logits, buffer in zip((chunk.teacher, chunk.student), chunk.buffers, strict=False):
            tail = buffer.copy_(logits).scatter_(1, tokens_nk, -torch.inf)
            m, total = exponentials(tail, self.temperature, out=tail)
            norms += [m, total.log()]
        teacher_nk, student_nk = (x.gather(1, tokens_nk) for x in (chunk.teacher, chunk.student))
        return tokens_nk, torch.cat([torch.stack(norms, 1), teacher_nk, student_nk], 1)

    def _write(
        self,
        chunk: Chunk,
        tokens_nk: torch.Tensor,
        factor_n: torch.Tensor,
        gradient_nk: torch.Tensor,
        log_z_n: torch.Tensor,
    ) -> None:
        q = chunk.buffers[0].copy_(chunk.student).scatter_(1, tokens_nk, -torch.inf)
        m = q.amax(-1).clamp_(min=torch.finfo(torch.float32).min)
        q.sub_(m[:, None]).div_(self.temperature)
        q.add_((m.double() / self.temperature - log_z_n).float()[:, None]).exp_()
        q.mul_(factor_n[:, None]).scatter_(1, tokens_nk, gradient_nk)
        chunk.write(q, self.temperature)


class _Merged:
    """The coarsened distributions, from every rank's part; few numbers, and so in float64."""

    def __init__(self, parts_rnp: torch.Tensor, top_k: int, temperature: float) -> None:
        parts = parts_rnp.double()
        k = (parts.size(-1) - 4) // 2
        m_t, log_z_t, m_s, log_z_s, *_ = parts.unbind(-1)
        self._ranks = parts.size(0)
        # Candidates of all ranks side by side, [n, ranks * k], and the ranks' tails, [n, ranks].
        teacher, student = (
            (part / temperature).transpose(0, 1).flatten(1) for part in parts[..., 4:].split(k, -1)
        )
        tails_t, tails_s = (m_t / temperature + log_z_t).T, (m_s / temperature + log_z_s).T
        likeliest = _likeliest(teacher, min(top_k, teacher.size(1)))
        self._chosen = torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, likeliest, True)
        self._log_p, log_p_tail, _ = self._shares(teacher, tails_t)
        self._log_q, log_q_tail, self._log_z = self._shares(student, tails_s)
        self._tail_ratio = (log_p_tail - log_q_tail).nan_to_num(
            nan=0.0, posinf=torch.inf, neginf=-torch.inf
        )
        ratio = torch.where(self._chosen, self._log_p - self._log_q, 0)
        terms = torch.cat([ratio, self._tail_ratio[:, None]], 1)
        p = torch.cat([self._log_p, log_p_tail[:, None]], 1).exp()
        self.loss_n = torch.where(p == 0, 0, p * terms).sum(-1)  # NaN stays NaN

    def gradient(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a rank's slice: of a tail's column by its q, [n]; of its candidates, [n, k]; log z.

        A column of the tail gets `q (1 - P / Q)`, with the two models' masses of the tail, one of
        the top k `q - p`.
        """
        factor = -torch.expm1(self._tail_ratio)
        q = self._log_q.exp()
        candidates = torch.where(self._chosen, q - self._log_p.exp(), q * factor[:, None])
        return factor.float(), candidates.chunk(self._ranks, 1)[rank].float(), self._log_z

    def _shares(
        self, candidates: torch.Tensor, tails: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log probabilities of the candidates and of all that is not chosen, and log z."""
        log_z = torch.cat([candidates, tails], 1).logsumexp(1)
        others = candidates.masked_fill(self._chosen, -torch.inf)
        tail = torch.cat([others, tails], 1).logsumexp(1)
        return candidates - log_z[:, None], tail - log_z, log_z


def _likeliest(logits_nv: torch.Tensor, k: int) -> torch.Tensor:
    """Tokens of the k largest logits, [n, k], in order; among equal logits the first ones.

    So it is on every layout, and bf16 has many that are equal.
    """
    count = logits_nv.size(0)
    least_n = logits_nv.topk(k, sorted=False).values.amin(-1)
    rows, tokens = (logits_nv < least_n[:, None]).logical_not_().nonzero(as_tuple=True)
    if tokens.numel() > count * k:
        sure = logits_nv[rows, tokens] > least_n[rows]
        room_n = k - torch.bincount(rows[sure], minlength=count)
        others_n = torch.bincount(rows[~sure], minlength=count)
        place = (~sure).cumsum(0) - (others_n.cumsum(0) - others_n)[rows]
        tokens = tokens[sure | (place <= room_n[rows])]
    return tokens.view(count, k)
