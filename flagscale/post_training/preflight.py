"""Checks that a distillation computes what it says: of what is seen of a few micro-batches.

Each check is a function of what `Tap` saw, of weights or of logits, and gives a `Finding`. What is
held against what training reports is computed anew in float64 (`float64.py`); where the two differ,
known mistakes are tried, to name the cause (`causes.py`). The bugs of 2026 that each would have
caught are in docs/audit.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flagscale.post_training.causes import cause_of_kd, cause_of_lm
from flagscale.post_training.findings import Finding, within
from flagscale.post_training.float64 import (
    cross_entropy,
    divergence,
    divergence_sum,
    hidden_gradient,
    row_sum,
    sparse_sum,
)
from flagscale.post_training.tap import STUDENT, Seen
from flagscale.recipe import DistillationRecipe

KD, LM = "logits distillation loss", "lm loss"
TOTAL = "total loss"
INTERMEDIATE, ATTENTION = "intermediate distillation loss", "attention distillation loss"

# What sums in fp32 may be off by: a share of the figure, and nats a token.
_RELATIVE, _PER_TOKEN = 1e-4, 1e-5
# A gradient's distance to float64's, as a share of it: in fp32, and where it is stored in 16 bits;
# there what the logits' rounding changes, twice, is allowed too.
_GRADIENT, _GRADIENT_16_BITS = 1e-3, 0.02
_WHEN_EQUAL = 1e-6  # nats a token, and a share of the gradient


def check_losses(seen: Seen, recipe: DistillationRecipe | None) -> list[Finding]:
    """Every loss that training reported of a micro-batch, against float64. TP ranks all call it.

    Args:
        seen: the micro-batch.
        recipe: the distillation; None: a plain LM loss.
    """
    unmasked = seen.mask_bs.double().sum().item()
    found = [check_count(seen)]
    if LM in seen.report:
        expected = row_sum(seen, STUDENT, cross_entropy)
        reported = seen.report[LM][0]
        found.append(
            _against(
                "LM loss",
                reported,
                expected.value,
                expected.rounding,
                unmasked,
                lambda: cause_of_lm(seen, reported, expected.value),
            )
        )
    if recipe is None:
        return found
    is_sparse = seen.targets is not None
    kd = sparse_sum(seen, recipe) if is_sparse else divergence_sum(seen, divergence(recipe))
    reported_kd = seen.report[KD][0]
    found.append(
        _against(
            "KD loss",
            reported_kd,
            kd.value,
            kd.rounding,
            unmasked,
            lambda: (
                "from what was read of the teacher it is another"
                if is_sparse
                else cause_of_kd(seen, recipe, reported_kd, kd.value)
            ),
        )
    )
    return [*found, check_total(seen, recipe)]


def check_total(seen: Seen, recipe: DistillationRecipe) -> Finding:
    """The total is the recipe's sum of the terms that are reported, and what is differentiated."""
    report = {name: value for name, (value, _) in seen.report.items()}
    total = recipe.kd_loss_scale * (
        report[KD]
        + recipe.intermediate_loss_scale * report.get(INTERMEDIATE, 0.0)
        + recipe.attention_loss_scale * report.get(ATTENTION, 0.0)
    )
    if not recipe.skip_lm_loss:
        total += report.get(LM, math.nan)
    unmasked = max(seen.mask_bs.double().sum().item(), 1)
    allowed = (_RELATIVE * abs(total)) / unmasked + _PER_TOKEN
    difference = (report[TOTAL] - total) / unmasked
    if abs(difference) <= allowed:
        difference = (seen.loss - total) / unmasked
        cause = (
            f"the loss that training takes the gradient of is {seen.loss / unmasked:.6g} nats a "
            f"token, not the total of the reported terms, {total / unmasked:.6g}"
        )
    else:
        cause = (
            f"the total is reported as {report[TOTAL] / unmasked:.6g} nats a token, but the terms "
            f"add up to {total / unmasked:.6g} with the recipe's weights"
        )
    return within("total loss", difference, allowed, "to the sum of its terms, nats a token", cause)


def check_count(seen: Seen) -> Finding:
    """The denominator of every loss, and of the gradient, is the number of unmasked tokens."""
    unmasked = seen.mask_bs.double().sum().item()
    counts = {"the gradient": seen.num_tokens} | {k: n for k, (_, n) in seen.report.items()}
    what, worst = max(counts.items(), key=lambda one: abs(one[1] - unmasked))
    tokens = seen.mask_bs.numel()
    cause = f"{what} is divided by {worst:g} tokens, but {unmasked:g} are not masked"
    if worst == tokens:
        cause += " (it is all of them: the mask is ignored in the denominator)"
    if not seen.is_sum:
        worst = math.inf
        cause = (
            "each micro-batch is divided by its own tokens (calculate_per_token_loss is off), so "
        )
        cause += "that one with few tokens counts as much as one with many"
    return within("denominator", worst - unmasked, 0, "to the number of unmasked tokens", cause)


def check_gradient(seen: Seen, recipe: DistillationRecipe) -> Finding:
    """The gradient in the student's last hidden states is float64's. TP ranks all call it.

    Args:
        seen: of the KD loss alone, with its gradient.
        recipe: the distillation.
    """
    head = seen.heads[STUDENT]
    expected_nh = hidden_gradient(seen, divergence(recipe))
    found_nh = head.gradient()
    # Of a student that is its teacher there is none; it is held against what there might be.
    floor = 1e-3 * recipe.temperature * seen.mask_bs.double().sum().item() ** 0.5
    floor *= (head.weight_vh.detach().norm() / head.weight_vh.size(0) ** 0.5).item()
    size = max(expected_nh.norm().item(), floor, 1e-30)
    difference = (found_nh - expected_nh).norm().item() / size
    allowed = _GRADIENT
    if head.dtype.itemsize == 2:
        rounded_nh = hidden_gradient(seen, divergence(recipe), stored=True)
        allowed = _GRADIENT_16_BITS + 2 * (rounded_nh - expected_nh).norm().item() / size
    along = (found_nh * expected_nh).sum().item() / size**2
    rest = (found_nh - along * expected_nh).norm().item() / size
    if rest <= allowed * max(1, abs(along)):
        cause = f"the KD loss' gradient is {along:.4g} times what it must be"
        if math.isclose(along * recipe.temperature**2, 1, rel_tol=0.01):
            cause += ": the factor T^2 is missing"
        elif math.isclose(along * recipe.temperature, 1, rel_tol=0.01):
            cause += ": a factor T is missing"
    else:
        cause = f"the KD loss' gradient differs from float64's by {difference:.3g} of it"
    return within("KD gradient", difference, allowed, "to float64's, as a share of it", cause)


def check_equal(seen: Seen, reference: float) -> list[Finding]:
    """A student that is the teacher has no loss and no gradient.

    Args:
        seen: of a student that is its own teacher, hidden states a leaf.
        reference: the gradient's norm of the real student, for the size.
    """
    unmasked = max(seen.mask_bs.double().sum().item(), 1)
    loss = seen.report[KD][0] / unmasked
    gradient = seen.heads[STUDENT].gradient().norm().item()
    share = gradient / max(reference, 0.01)
    return [
        within(
            "loss when equal",
            loss,
            _WHEN_EQUAL,
            "KD loss of the teacher against itself, nats a token",
            f"the KD loss of the teacher against itself is {loss:.3g} nats a token, not 0: the "
            "conversion is wrong",
        ),
        within(
            "gradient when equal",
            share,
            _WHEN_EQUAL,
            "of the teacher against itself, as a share of the student's",
            f"the teacher against itself has a gradient of {share:.3g} of the student's, not 0: "
            "the loss is least at other logits than the teacher's",
        ),
    ]


def check_mixed(alone: Seen, mixed: Seen) -> Finding:
    """The KD term is the same with the LM loss beside it."""
    return unchanged(
        "KD loss beside LM loss",
        alone,
        mixed,
        "change of the KD term when the LM loss is mixed in",
        "when the LM loss is mixed in: it reads logits that the cross entropy has overwritten, or "
        "is weighed with it",
        (KD,),
    )


def check_validation(trained: Seen, evaluated: Seen) -> Finding:
    """Validation reports the same losses of the same weights."""
    return unchanged(
        "losses in validation",
        trained,
        evaluated,
        "largest change of a loss in evaluation mode",
        "in evaluation mode: dropout is on, or one of the two is computed otherwise",
        (KD, LM),
    )


def unchanged(
    check: str, seen: Seen, again: Seen, note: str, why: str, names: Sequence[str] = ()
) -> Finding:
    """Losses of two runs, which must be the same.

    Args:
        check: its name.
        seen: the first run.
        again: the second.
        note: what the figure is.
        why: after "the ... changes from ... to ... nats a token".
        names: which losses; default: all.
    """
    unmasked = max(seen.mask_bs.double().sum().item(), 1)
    worst, cause = (0.0, 0.0, -1.0), ""
    for name in names or seen.report:
        before, after = (one.report[name][0] / unmasked for one in (seen, again))
        allowed = _RELATIVE * abs(before) + _PER_TOKEN
        share = abs(after - before) / allowed
        if not share <= worst[2]:
            worst = (after - before, allowed, share)
            cause = f"the {name} changes from {before:.6g} to {after:.6g} nats a token {why}"
    return within(check, worst[0], worst[1], f"{note}, nats a token", cause)


def _against(
    check: str,
    reported: float,
    expected: float,
    rounding: float,
    unmasked: float,
    cause: Callable[[], str],
) -> Finding:
    unmasked = max(unmasked, 1)
    allowed = (rounding + _RELATIVE * abs(expected)) / unmasked + _PER_TOKEN
    difference = (reported - expected) / unmasked
    text = ""
    if not abs(difference) <= allowed:
        text = (
            f"the {check} is reported as {reported / unmasked:.6g} nats a token, but is "
            f"{expected / unmasked:.6g} in float64 from the same hidden states: {cause()}"
        )
    return within(check, difference, allowed, "to float64's, nats a token", text)
