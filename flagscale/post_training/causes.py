"""Why a reported loss may be another than it should: known mistakes, each computed in float64.

Looked for only where a figure is wrong already: a mistake whose own figure is the reported one is
named as the likely cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from flagscale.post_training.float64 import (
    cross_entropy,
    divergence,
    divergence_sum,
    row_sum,
)
from flagscale.post_training.tap import STUDENT, Head, Seen
from flagscale.recipe import DistillationRecipe

# Relative: known mistakes are further apart, as a rule even from logits that are stored in 16 bits.
_MATCHES, _MATCHES_16_BITS = 2e-3, 0.03
_TOP = (1, 4, 8, 16, 32, 50, 64, 100, 128)


def cause_of_kd(seen: Seen, recipe: DistillationRecipe, reported: float, expected: float) -> str:
    """A clause that names the mistake that gives the reported sum of the KD loss, if any does."""
    for name, figure in _kd_mistakes(seen, recipe):
        if _same(reported, figure, seen):
            return f"it is {name}"
    return _ratio(seen, reported, expected) or "none of the known mistakes gives this figure"


def cause_of_lm(seen: Seen, reported: float, expected: float) -> str:
    """The same of the LM loss."""
    for name, figure in _lm_mistakes(seen):
        if _same(reported, figure, seen):
            return f"it is {name}"
    return _ratio(seen, reported, expected) or "none of the known mistakes gives this figure"


def _kd_mistakes(seen: Seen, recipe: DistillationRecipe) -> Iterator[tuple[str, float]]:
    temperature = recipe.temperature

    def summed(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        return divergence_sum(seen, function).value

    function = divergence(recipe)
    if temperature != 1:
        yield "without the factor T^2", summed(function) / temperature**2
        yield "with T^2 twice", summed(function) * temperature**2
        for t_s, t_t, what in (
            (1.0, temperature, "the teacher's logits alone"),
            (temperature, 1.0, "the student's logits alone"),
            (1.0, 1.0, "neither model's logits"),
        ):
            for factor in (temperature**2, 1.0):
                name = f"with the temperature applied to {what}"
                yield name, summed(lambda s, t, a=t_s, b=t_t, f=factor: f * _kl(t / b, s / a))
    for squared in {temperature**2, 1.0}:
        for name, mistake in _OTHERS.items():
            yield (
                name,
                summed(lambda s, t, m=mistake, f=squared: f * m(s / temperature, t / temperature)),
            )
    for k in _TOP:
        name = f"over the teacher's top {k} tokens alone, renormalised"
        yield name, summed(lambda s, t, k=k: temperature**2 * _top(s, t, temperature, k))
    name = "computed on logits that the cross entropy has overwritten"
    yield name, summed(lambda s, t: function(s.softmax(-1), t))
    everything = replace(seen, mask_bs=torch.ones_like(seen.mask_bs))
    yield (
        "summed over the masked tokens too: the mask is ignored",
        divergence_sum(everything, function).value,
    )
    padded = replace(seen, heads={name: _padded(head) for name, head in seen.heads.items()})
    yield (
        "with the padding of the vocabulary in the softmax",
        divergence_sum(padded, function).value,
    )


def _lm_mistakes(seen: Seen) -> Iterator[tuple[str, float]]:
    twice = seen.labels_bs.roll(-1, dims=1)
    twice[:, -1] = seen.labels_bs[:, -1]
    for name, labels in (
        ("that of labels which are not shifted: each token predicts itself", seen.tokens_bs),
        ("that of labels which are shifted twice", twice),
    ):
        yield name, row_sum(seen, STUDENT, cross_entropy, labels).value
    everything = replace(seen, mask_bs=torch.ones_like(seen.mask_bs))
    name = "summed over the masked tokens too: the mask is ignored"
    yield name, row_sum(everything, STUDENT, cross_entropy).value
    padded = replace(seen, heads={name: _padded(head) for name, head in seen.heads.items()})
    name = "with the padding of the vocabulary in the softmax"
    yield name, row_sum(padded, STUDENT, cross_entropy).value


def _ratio(seen: Seen, reported: float, expected: float) -> str | None:
    """Sums that are off by a factor which something is the count of."""
    ratio = reported / expected if expected else 0.0
    unmasked, tokens = seen.mask_bs.sum().item(), seen.mask_bs.numel()
    head = seen.heads[STUDENT]
    for name, factor in (
        ("a mean over the vocabulary, not a sum", 1 / head.vocab_size),
        ("a mean over the padded vocabulary, not a sum", 1 / _padded(head).vocab_size),
        ("a mean over the unmasked tokens, not their sum", 1 / max(unmasked, 1)),
        ("a mean over all tokens, masked ones too", 1 / tokens),
        ("scaled by the share of masked tokens", tokens / max(unmasked, 1)),
        ("scaled by the share of unmasked tokens", unmasked / tokens),
        ("without its sign", -1.0),
    ):
        if ratio and factor != 1 and _same(ratio, factor, seen):
            return f"it is {name}"
    for times in range(2, 65):
        if _same(ratio, times, seen):
            return f"it is {times} times too large: summed over ranks, or counted, that often"
        if _same(ratio, 1 / times, seen):
            return f"it is {times} times too small: divided by ranks or tokens once too often"
    return None


def _same(one: float, other: float, seen: Seen) -> bool:
    in_16_bits = seen.heads[STUDENT].dtype.itemsize == 2
    return abs(one - other) <= (_MATCHES_16_BITS if in_16_bits else _MATCHES) * abs(other)


def _padded(head: Head) -> Head:
    return replace(head, vocab_size=head.weight_vh.size(0) * head.group.size())


def _kl(p_nv: torch.Tensor, q_nv: torch.Tensor) -> torch.Tensor:
    log_p, log_q = p_nv.log_softmax(-1), q_nv.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _top(s_nv: torch.Tensor, t_nv: torch.Tensor, temperature: float, k: int) -> torch.Tensor:
    top = t_nv.topk(min(k, t_nv.size(-1)), dim=-1)
    return _kl(top.values / temperature, s_nv.gather(-1, top.indices) / temperature)


_OTHERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "the forward KL": lambda s, t: _kl(t, s),
    "the reverse KL": lambda s, t: _kl(s, t),
    "soft cross entropy: the teacher's entropy is not taken off": lambda s, t: (
        -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)
    ),
    "soft cross entropy the other way round": lambda s, t: (
        -(s.softmax(-1) * t.log_softmax(-1)).sum(-1)
    ),
    "half of the sum of both KLs": lambda s, t: (_kl(t, s) + _kl(s, t)) / 2,
}
