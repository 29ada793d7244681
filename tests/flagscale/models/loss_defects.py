"""Defects in losses, in what they are given and in what is told of them."""

from collections.abc import Callable
from typing import Any

import torch
from audited_case import Case, Plant, after_conversion, apart, with_logits, with_terms
from megatron.core.models.gpt import GPTModel

from flagscale.post_training import attention_relations, conversion, loss_func
from flagscale.post_training.divergences import Divergence
from flagscale.post_training.divergences.total_variation import TotalVariation
from flagscale.post_training.hidden_states import FITS
from flagscale.train import train_gpt
from flagscale.train.batches import get_batch


def kl(p_v: torch.Tensor, q_v: torch.Tensor) -> torch.Tensor:
    log_p, log_q = p_v.log_softmax(-1), q_v.log_softmax(-1)
    # Of what is no token both are -inf.
    return (log_p.exp() * torch.where(log_p.isneginf(), 0.0, log_p - log_q)).sum(-1)


def entropy(p_v: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=p_v.clamp(min=-1e4)).entropy()


def kd(function: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> Plant:
    """Another KD loss, of (student's logits, teacher's logits, temperature)."""

    class Planted(Divergence):
        def loss_and_gradient(self, student_nv, teacher_nv, group=None, *, with_gradient=True):
            leaf_nv = student_nv.detach().float().requires_grad_()
            with torch.enable_grad():
                loss_n = function(leaf_nv, teacher_nv.float(), self.temperature)
                (gradient_nv,) = torch.autograd.grad(loss_n.sum(), leaf_nv)
            if not with_gradient:
                return loss_n.detach(), None
            return loss_n.detach(), student_nv.copy_(gradient_nv)

        def _work(self, *_):
            raise NotImplementedError

    def plant(case: Case) -> None:
        case.patch.setattr(conversion, "divergence_of", lambda recipe: Planted(recipe.temperature))

    return plant


def top_k_renormalised(s: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
    top = t.topk(32, -1)
    return temperature**2 * kl(top.values / temperature, s.gather(-1, top.indices) / temperature)


def gradient_times(factor: float) -> Plant:
    """The value is right."""

    def loss(s: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
        right = temperature**2 * kl(t / temperature, s / temperature)
        return right * factor + (right * (1 - factor)).detach()

    return kd(loss)


def no_temperature(case: Case) -> None:
    """In one of the divergences that the recipe has not chosen."""
    right = TotalVariation.loss_and_gradient

    def wrong(self: Any, *inputs: Any, **named: Any) -> Any:
        loss, gradient = right(self, *inputs, **named)
        return loss / self.temperature**2, gradient

    case.patch.setattr(TotalVariation, "loss_and_gradient", wrong)


def get_batch_with(**changes: Callable[[Any], torch.Tensor]) -> Plant:
    def plant(case: Case) -> None:
        def changed(*args: Any) -> Any:
            batch = get_batch(*args)
            return batch._replace(**{name: change(batch) for name, change in changes.items()})

        case.patch.setattr(train_gpt, "get_batch", changed)

    return plant


def summed(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> Plant:
    """Another sum over the tokens: of (the right one, loss mask)."""

    def plant(case: Case) -> None:
        right = loss_func.masked_sum

        def masked_sum(output: Any, mask: torch.Tensor) -> torch.Tensor:
            return function(lambda m: right(output, m), mask)

        case.patch.setattr(loss_func, "masked_sum", masked_sum)

    return plant


def result(function: Callable[..., Any]) -> Plant:
    """Another result of `loss_func`: of (loss, number of tokens, report, mask)."""

    def plant(case: Case) -> None:
        right = train_gpt.loss_func_modelopt

        def changed(mask: torch.Tensor, *args: Any, **named: Any) -> Any:
            return function(*right(mask, *args, **named), mask)

        case.patch.setattr(train_gpt, "loss_func_modelopt", changed)

    return plant


def all_are_counted(loss, num_tokens, report, mask):
    count = torch.tensor(float(mask.numel()))
    counted = {name: torch.stack([sums[0], count]) for name, sums in report.items()}
    return loss, count.int(), counted


def lm_is_differentiated(loss, num_tokens, report, mask):
    return loss / 2, num_tokens, report


def lm_loss_twice(model: Any, teacher: GPTModel) -> None:
    right = model.loss_balancer.forward

    def forward(losses: Any) -> Any:
        found = right(losses)
        return found | {"kd_loss": found["kd_loss"] + losses["student_loss"]}

    model.loss_balancer.forward = forward


def otherwise_in_validation(model: Any, teacher: GPTModel) -> None:
    right = model.loss_balancer.forward

    def forward(losses: Any) -> Any:
        found = right(losses)
        return found if model.training else {k: 1.5 * loss for k, loss in found.items()}

    model.loss_balancer.forward = forward


def scores_not_scaled(case: Case) -> None:
    def scores(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return row.float() @ column.float().transpose(2, 3)

    case.patch.setattr(attention_relations, "_scores", scores)


def overwritten_logits(case: Case) -> None:
    apart(case)
    case.patch.setattr(conversion, "_keep_logits_for_the_kd_loss", lambda model: None)


LOSS_DEFECTS: dict[str, tuple[Plant, str]] = {
    "soft cross entropy as KL": (
        kd(lambda s, t, x: x * x * kl(t / x, s / x) + x * x * entropy(t / x)),
        "KD loss is reported as .* it is soft cross entropy: the teacher's entropy is not taken",
    ),
    "top-k renormalised": (kd(top_k_renormalised), "it is over the teacher's top 32 .*renormalis"),
    "reversed KL": (kd(lambda s, t, x: x * x * kl(s / x, t / x)), "it is the reverse KL"),
    "temperature not squared": (
        kd(lambda s, t, x: kl(t / x, s / x)),
        r"it is without the factor T\^2",
    ),
    "temperature of one model": (
        kd(lambda s, t, x: x * x * kl(t, s / x)),
        "it is with the temperature applied to the student's logits alone",
    ),
    "masked teacher's log-probabilities": (
        kd(lambda s, t, x: x * x * kl(t.where((t > t.median()) | t.isneginf(), -1e4) / x, s / x)),
        "KD loss is reported as .* but is .* in float64 from the same hidden states",
    ),
    "mean over the vocabulary": (
        kd(lambda s, t, x: x * x * kl(t / x, s / x) / s.size(-1)),
        r"it is a mean over the (padded )?vocabulary, not a sum",
    ),
    "temperature missing in the gradient": (
        gradient_times(0.25),
        r"KD loss' gradient is 0.25 times what it must be: the factor T\^2 is missing",
    ),
    "gradient's sign": (gradient_times(-1), "gradient is -1 times what it must be"),
    "validation otherwise": (
        after_conversion(otherwise_in_validation),
        "changes from .* to .* in evaluation mode",
    ),
    "another divergence without T^2": (no_temperature, "total_variation differs by 0.7"),
    "labels shifted twice": (
        get_batch_with(labels=lambda b: b.labels.roll(-1, 1)),
        "labels that the loss is given are shifted twice",
    ),
    "labels not shifted": (
        get_batch_with(labels=lambda b: b.tokens),
        "labels that the loss is given are not shifted",
    ),
    "mask shifted": (
        get_batch_with(loss_mask=lambda b: b.loss_mask.roll(1, 1)),
        "given another mask than the data loader's",
    ),
    "position ids off by one": (
        get_batch_with(position_ids=lambda b: b.position_ids + 1),
        "position ids begin at 1, not 0",
    ),
    "mask ignored in the loss": (
        with_logits(summed(lambda right, mask: right(torch.ones_like(mask)))),
        "it is summed over the masked tokens too: the mask is ignored",
    ),
    "mask ignored in the loss, fused": (
        summed(lambda right, mask: right(torch.ones_like(mask))),
        "fails: .* differentiated in another way than its gradient was computed for",
    ),
    "mask ignored in the denominator": (
        result(all_are_counted),
        "divided by 64 tokens, but .* are not masked .* the mask is ignored in the denominator",
    ),
    "wrong token count": (
        summed(lambda right, mask: right(mask) * mask.numel() / mask.sum()),
        "it is scaled by the share of masked tokens",
    ),
    "summed over ranks twice": (
        summed(lambda right, mask: 2 * right(mask)),
        "it is 2 times too large: summed over ranks",
    ),
    "a mean, not a sum": (
        summed(lambda right, mask: right(mask) / mask.sum()),
        "it is a mean over the unmasked tokens, not their sum",
    ),
    "another loss is differentiated": (
        result(lm_is_differentiated),
        "the loss that training takes the gradient of is .* not the total of the reported terms",
    ),
    "LM loss twice": (after_conversion(lm_loss_twice), "total is reported as .* but the terms add"),
    "logits overwritten by cross entropy": (
        overwritten_logits,
        "changes from .* when the LM loss is mixed in: it reads logits that the cross entropy",
    ),
    "another fit of hidden states": (
        with_terms(lambda case: case.patch.setitem(FITS, "mse", FITS["cosine"])),
        "intermediate distillation loss is reported as .* but is .* in float64",
    ),
    "attention's scores not scaled": (
        with_terms(scores_not_scaled),
        "attention distillation loss is reported as .* but is .* in float64",
    ),
}
