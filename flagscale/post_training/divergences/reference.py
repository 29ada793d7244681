"""Every divergence once more: float64, straight from the definition, whole rows, autograd.

What the fast ones are compared with, by the tests and by the audit; nothing here is shared with
them. Slow, and it holds many copies of the logits.
"""

from __future__ import annotations

import torch

from flagscale.post_training.sparse_targets import SparseRows
from flagscale.recipe import DistillationRecipe


def reference_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, recipe: DistillationRecipe
) -> torch.Tensor:
    """The recipe's divergence of every row, with its `T^2`.

    Args:
        student_logits: [..., V], the whole vocabulary, any dtype; differentiable.
        teacher_logits: the same shape.
        recipe: names the divergence, its temperature and its parameter.

    Returns:
        float64 [...], nats (for `total_variation` and `logits_mse` without a unit).
    """
    s = student_logits.double() / recipe.temperature
    t = teacher_logits.double() / recipe.temperature
    if recipe.divergence == "logits_mse":
        # Padding's logits are -10,000, and -inf where there is no such column.
        is_token = torch.maximum(teacher_logits, student_logits) > -9000
        squares = torch.where(is_token, s - t, 0).square().sum(-1)
        return recipe.temperature**2 * squares / is_token.sum(-1)
    log_p, log_q = torch.log_softmax(t, -1), torch.log_softmax(s, -1)
    return recipe.temperature**2 * _divergence(log_p, log_q, recipe)


def reference_gradient(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, recipe: DistillationRecipe
) -> torch.Tensor:
    """float64 [..., V], the derivative of each row's loss by the student's logits."""
    student = student_logits.detach().double().requires_grad_()
    loss = reference_loss(student, teacher_logits.detach(), recipe)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return gradient


def reference_sparse_loss(
    student_nv: torch.Tensor, targets: SparseRows, temperature: float, top_k: int | None = None
) -> torch.Tensor:
    """As `reference_loss`, from a teacher of whom some tokens' probabilities are known.

    Args:
        student_nv: [N, V], the whole vocabulary.
        targets: of the same rows.
        temperature: that they are of.
        top_k: tokens that count one by one, where the others' mass is known; None: all that are.
    """
    log_q = torch.log_softmax(student_nv.double() / temperature, -1)
    p = torch.zeros_like(log_q).scatter_add_(-1, targets.tokens_nk, targets.shares_nk.double())
    if targets.tail_n is None:
        cross_entropy = -(p / p.sum(-1, keepdim=True) * log_q.masked_fill(p == 0, 0)).sum(-1)
        return temperature**2 * (cross_entropy - targets.entropy_n.double())
    known = int((targets.shares_nk > 0).sum(-1).amax())
    order = p.sort(dim=-1, descending=True, stable=True).indices
    first, rest = order.tensor_split([min(top_k or known, known)], -1)
    tail = targets.tail_n.double()[:, None] + p.gather(-1, rest).sum(-1, keepdim=True)
    coarse_p = torch.cat([p.gather(-1, first), tail], -1)
    coarse_p = coarse_p / coarse_p.sum(-1, keepdim=True)
    q_tail = log_q.gather(-1, rest).exp().sum(-1, keepdim=True)
    coarse_q = torch.cat([log_q.gather(-1, first).exp(), q_tail], -1)
    return temperature**2 * _kl(coarse_p.log(), coarse_q.log())


def _divergence(
    log_p: torch.Tensor, log_q: torch.Tensor, recipe: DistillationRecipe
) -> torch.Tensor:
    match recipe.divergence:
        case "forward_kl":
            return _kl(log_p, log_q)
        case "reverse_kl":
            return _kl(log_q, log_p)
        case "jensen_shannon":
            log_m = _log_mixture(log_p, log_q, recipe.beta)
            return recipe.beta * _kl(log_p, log_m) + (1 - recipe.beta) * _kl(log_q, log_m)
        case "skew_kl":
            return _kl(log_p, _log_mixture(log_p, log_q, recipe.alpha))
        case "total_variation":
            return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
        case "top_k_kl":
            return _top_k_kl(log_p, log_q, recipe.top_k)
    raise ValueError(f"divergence={recipe.divergence!r} has no reference")


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`sum p log(p / q)`, 0 log 0 being 0."""
    p_is_0 = torch.isneginf(log_p)
    p = log_p.masked_fill(p_is_0, 0).exp().masked_fill(p_is_0, 0)
    return (p * (log_p - log_q).masked_fill(p_is_0, 0)).sum(-1)


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight p + (1 - weight) q)."""
    mixture = weight * log_p.exp() + (1 - weight) * log_q.exp()
    return torch.where(mixture > 0, mixture, 1).log()  # the log of what is no token is not used


def _top_k_kl(log_p: torch.Tensor, log_q: torch.Tensor, top_k: int) -> torch.Tensor:
    """KL of the teacher's k likeliest tokens and of one bucket with all others."""
    order = log_p.sort(dim=-1, descending=True, stable=True).indices  # of equal ones the first
    first, rest = order.tensor_split([top_k], -1)
    coarse = []
    for log in (log_p, log_q):
        tail = log.gather(-1, rest).exp().sum(-1, keepdim=True)
        coarse.append(torch.cat([log.gather(-1, first).exp(), tail], -1).log())
    return _kl(*coarse)
