"""How far what is read from the teacher that was asked: of any codec, on any logits.

With p the teacher's distribution, q the student's and p' what was decoded, all at the temperature:

    kl                    KL(p' || p), of the decoded distribution from the true one
    loss_error            mean of the loss from p' less that from p
    gradient_error        of single tokens: sqrt(mean |g' - g|^2 / mean |g|^2), g = q - p, by the
                          student's logits
    gradient_bias         of many tokens: mean <g' - g, g> / mean |g|^2; what does not average out

The first two are in nats a token. An unbiased codec has a gradient error, the noise of its draws,
but neither a loss error nor a gradient bias beyond their standard errors. Where a tail's mass is
all that is known of it, the loss takes the tail as one token, so that its gradient spreads the mass
as the student does; `kl` spreads it evenly.
"""

from __future__ import annotations

import torch

from flagscale.teacher_outputs.values import SparseTargets

_CHUNK_ELEMENTS = 2**22  # of one fp64 buffer: 32 MiB


class BiasMeter:
    """Adds up tokens; in float64."""

    def __init__(self, temperature: float) -> None:
        """Keep the temperature, for sparse targets the stored one."""
        self._temperature = temperature
        self._tokens: list[torch.Tensor] = []

    @torch.no_grad()
    def add(
        self,
        decoded: SparseTargets | torch.Tensor,
        teacher_bsv: torch.Tensor,
        student_bsv: torch.Tensor,
        loss_mask_bs: torch.Tensor | None = None,
    ) -> None:
        """Take the tokens of some samples.

        Args:
            decoded: what was read; or logits [b, s, V], made of the hidden states that were read.
            teacher_bsv: the live teacher's logits, the whole vocabulary without padding.
            student_bsv: any student's.
            loss_mask_bs: tokens where it is 0 do not count.
        """
        flat = teacher_bsv.flatten(0, 1), student_bsv.flatten(0, 1)
        wanted_m = torch.arange(len(flat[0]), device=teacher_bsv.device)
        if loss_mask_bs is not None:
            wanted_m = wanted_m[loss_mask_bs.flatten().to(wanted_m.device) > 0]
        for at_n in wanted_m.split(max(_CHUNK_ELEMENTS // teacher_bsv.size(-1), 1)):
            log_p, log_q = (self._log_softmax(logits[at_n]) for logits in flat)
            if isinstance(decoded, SparseTargets):
                figures = _of_sparse(_rows(decoded, at_n), log_p, log_q)
            else:
                figures = _of_logits(self._log_softmax(decoded.flatten(0, 1)[at_n]), log_p, log_q)
            kl, loss, gradient = figures
            true = log_q.exp() - log_p.exp()
            error = gradient - true
            self._tokens.append(
                torch.stack(
                    [
                        kl,
                        loss - _kl(log_p, log_q),
                        error.square().sum(-1),
                        (error * true).sum(-1),
                        true.square().sum(-1),
                    ]
                ).cpu()
            )

    def result(self) -> dict[str, float]:
        """The figures, standard errors beside the means that have one, and `tokens`.

        Raises:
            ValueError: no token was added.
        """
        figures = torch.cat([torch.empty(5, 0, dtype=torch.float64), *self._tokens], 1)
        if not figures.numel():
            raise ValueError("no token was added whose loss counts")
        kl_n, loss_n, error_n, along_n, true_n = figures
        square = float(true_n.mean())
        return {
            "tokens": float(len(kl_n)),
            "kl": float(kl_n.mean()),
            "loss_error": float(loss_n.mean()),
            "loss_standard_error": _standard_error(loss_n),
            "gradient_error": (float(error_n.mean()) / square) ** 0.5 if square else 0.0,
            "gradient_bias": float(along_n.mean()) / square if square else 0.0,
            "gradient_standard_error": _standard_error(along_n) / square if square else 0.0,
        }

    def _log_softmax(self, logits_nv: torch.Tensor) -> torch.Tensor:
        return (logits_nv.double() / self._temperature).log_softmax(-1)


Figures = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # kl [n], loss [n], gradient [n, V]


def _of_logits(log_p2: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> Figures:
    return _kl(log_p2, log_p), _kl(log_p2, log_q), log_q.exp() - log_p2.exp()


def _of_sparse(rows: SparseTargets, log_p: torch.Tensor, log_q: torch.Tensor) -> Figures:
    tokens, shares, q = rows.tokens_bsk, rows.shares_bsk.double(), log_q.exp()
    shares_v = torch.zeros_like(q).scatter_add_(1, tokens, shares)  # fillers add 0
    log_q_of_tokens = log_q.gather(1, tokens)
    if rows.tail_bs is None:
        loss = -(shares * log_q_of_tokens).sum(-1) - rows.entropy_bs.double()
        return _kl(shares_v.log(), log_p), loss, q - shares_v
    tail = rows.tail_bs.double()[:, None]
    is_tail = torch.ones_like(q).scatter_(1, tokens, 0.0)
    even = is_tail * tail / is_tail.sum(-1, keepdim=True).clamp(min=1)
    q_tail = (q * is_tail).sum(-1, keepdim=True)
    as_student = is_tail * q * (tail / q_tail.clamp(min=torch.finfo(q.dtype).tiny))
    loss = _kl(shares.log(), log_q_of_tokens) + _kl(tail.log(), q_tail.log())
    return _kl((shares_v + even).log(), log_p), loss, q - shares_v - as_student


def _rows(decoded: SparseTargets, at_n: torch.Tensor) -> SparseTargets:
    """Of [b, s, ...] those positions as [n, ...]."""
    values = (decoded.tokens_bsk, decoded.shares_bsk, decoded.tail_bs, decoded.entropy_bs)
    tokens, shares, tail, entropy = (
        None if value is None else value.flatten(0, 1).to(at_n.device)[at_n] for value in values
    )
    assert tokens is not None
    assert shares is not None
    assert entropy is not None
    return SparseTargets(tokens, shares, tail, entropy)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """`sum a log(a / b)`, 0 log 0 being 0."""
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0).sum(-1)


def _standard_error(values_n: torch.Tensor) -> float:
    return float(values_n.std() / len(values_n) ** 0.5) if len(values_n) > 1 else 0.0
