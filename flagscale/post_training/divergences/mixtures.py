"""Logarithms of a mixture of two distributions, without overflow, precise where both are close."""

from __future__ import annotations

import torch

from flagscale.post_training.divergences.rows import Rows

_LIMIT = torch.finfo(torch.float32).max


def logs_of_mixture(rows: Rows, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`log(p / m)` and `log(q / m)`, with `m = weight p + (1 - weight) q`.

    With x = log(p / q), `m / q = 1 + weight (exp(x) - 1)` and `m / p = 1 + (1 - weight) (exp(-x) -
    1)`: the one whose exponent is negative gives both.

    Returns:
        float32 [n, V] each; `log_ratio` and `spare` are overwritten.
    """
    x = rows.log_ratio
    if weight == 0:
        return x, rows.spare.zero_()
    x.clamp_(-_LIMIT, _LIMIT)
    log_m = torch.abs(x, out=rows.spare).neg_().expm1_()
    # Over the larger of p and q: the other's weight is 1 - weight where x > 0, else weight.
    log_m.mul_(torch.sign(x).mul_(0.5 - weight).add_(0.5)).log1p_()
    log_m.neg_()
    to_p = torch.minimum(x, x.new_zeros(())).add_(log_m)
    return to_p, log_m.sub_(x.clamp_(min=0))
