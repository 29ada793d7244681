"""Checks of what goes into a distillation's loss: batches, weights, and the two models' work.

Each gives a `Finding`, as those of the loss itself do (`preflight.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.post_training.findings import Finding, fault, within
from flagscale.post_training.float64 import loss_and_entropy
from flagscale.post_training.preflight import unchanged
from flagscale.post_training.tap import TEACHER, Seen

_OVERCONFIDENT = 1.0  # nats that a model loses more than it expects to lose


def check_masked(seen: Seen, perturbed: Seen) -> Finding:
    """What stands at masked positions has no influence on any loss.

    Args:
        seen: the micro-batch.
        perturbed: the same with other labels, and other hidden states, where it is masked.
    """
    return unchanged(
        "masked tokens",
        seen,
        perturbed,
        "largest change of a loss when masked positions are perturbed",
        "when masked positions are perturbed: the mask is ignored",
    )


def check_causal(seen: Seen, perturbed: Seen) -> list[Finding]:
    """Tokens after a position do not change what either model makes of it.

    Args:
        seen: the micro-batch.
        perturbed: the same with other tokens after the last position that is not masked.
    """
    found = []
    unmasked = seen.mask_bs > 0
    for whose in seen.heads:
        rows = [_hidden_bsh(one, whose)[unmasked] for one in (seen, perturbed)]
        size = rows[0].norm().item()
        share = (rows[1] - rows[0]).norm().item() / max(size, 1e-30)
        found.append(
            within(
                f"{whose} is causal",
                share,
                1e-3 if seen.heads[whose].dtype.itemsize > 2 else 0.03,
                "change of hidden states when later tokens change, as a share",
                f"the {whose}'s hidden states change by {share:.3g} of themselves when later "
                "tokens change: attention is not causal",
            )
        )
    return found


def check_batch(seen: Seen, given: dict[str, torch.Tensor]) -> list[Finding]:
    """What the model was given is the data loader's, and each label the token after.

    Args:
        seen: the micro-batch, of ranks that share no context.
        given: the data loader's, of one row.
    """
    tokens, labels = given["tokens"].flatten().tolist(), given["labels"].flatten().tolist()
    unmasked = (given["loss_mask"].flatten() > 0).tolist()
    cause = None
    if tokens != seen.tokens_bs.flatten().tolist():
        cause = "the model is given other tokens than the data loader's"
    elif not torch.equal(given["loss_mask"].flatten().cpu(), seen.mask_bs.flatten().cpu()):
        cause = "the loss is given another mask than the data loader's"
    else:
        cause = _shift(tokens, labels, unmasked, "the data loader's labels")
        cause = cause or _shift(
            tokens, seen.labels_bs.flatten().tolist(), unmasked, "the labels that the loss is given"
        )
        if cause is None and labels != seen.labels_bs.flatten().tolist():
            cause = "the loss is given other labels than the data loader's"
    return [
        fault("labels", cause, "each is the token after, shifted once"),
        fault("positions", _positions(seen.positions_bs), "rise by one from 0 in each document"),
    ]


def check_teacher(seen: Seen, alone_bsh: torch.Tensor, modules: GPTModel) -> Finding:
    """The teacher is frozen, in evaluation mode, and computes what it does without the student.

    Args:
        seen: of a training step.
        alone_bsh: its last hidden states when run by itself, in evaluation mode.
        modules: the teacher, right after that step.
    """
    what = "the teacher beside the student"
    cause = None
    difference = (_hidden_bsh(seen, TEACHER) - alone_bsh.double()).norm().item()
    difference /= max(alone_bsh.double().norm().item(), 1e-30)
    if next((m for m in modules.modules() if m.training), None) is not None:
        cause = f"{what} is in training mode (its dropout is on): it must be in evaluation mode"
    elif any(parameter.requires_grad for parameter in modules.parameters()):
        cause = f"{what} is trainable: all of its parameters must be frozen"
    elif any(parameter.grad is not None for parameter in modules.parameters()):
        cause = f"{what} keeps gradients: it must have none"
    elif seen.heads[TEACHER].hidden_sbh.requires_grad:
        cause = f"{what} records a graph for gradients: it must run without"
    fp32 = seen.heads[TEACHER].dtype.itemsize > 2
    finding = within(
        "teacher is frozen",
        difference,
        1e-4 if fp32 else 0.03,
        "its hidden states beside the student, to those alone, as a share",
        f"{what} computes hidden states that differ by {difference:.3g} from those it computes "
        "alone: dropout is on, or it is given something else",
    )
    if cause is None:
        return finding
    return Finding(finding.check, difference, finding.tolerance, "failed", cause)


def check_teacher_loss(seen: Seen, unigram: float) -> Finding:
    """The teacher predicts the data better than the frequency of tokens does. TP ranks all call it.

    Random weights predict nearly uniformly, and so lose about as much as they expect to. One that
    is broken, or knows other token ids, is sure of what is wrong.

    Args:
        seen: of enough tokens.
        unigram: the loss of the tokens' frequencies on the same labels, nats a token.
    """
    unmasked = max(seen.mask_bs.double().sum().item(), 1)
    loss, expects = (total / unmasked for total in loss_and_entropy(seen, TEACHER))
    vocab = math.log(seen.heads[TEACHER].vocab_size)
    said = f"the teacher's loss is {loss:.3f} nats a token, and that of the tokens' frequencies "
    said += f"{unigram:.3f}"
    name, note = "teacher's loss", "nats a token; the tolerance is the unigram model's"
    if loss <= unigram:
        return Finding(name, loss, unigram, "passed", note)
    if loss - expects <= _OVERCONFIDENT and expects > vocab - 1 and expects < vocab - 1e-6:
        note = (
            f"{said}: it predicts nearly uniformly (entropy {expects:.3f} of at most "
            f"{vocab:.3f}), as random weights do; there is nothing to be learnt from it"
        )
        return Finding(name, loss, unigram, "warning", note)
    note = (
        f"{said}: its weights are broken (a norm or a layer that was not loaded, rows in another "
        "order), or its tokenizer is not the data's"
    )
    return Finding(name, loss, unigram, "failed", note)


def check_weights(whose: str, parameters: Iterable[tuple[str, torch.Tensor]]) -> Finding:
    """No weight is all zero, or NaN or infinite. Biases may be zero."""
    cause = None
    count = 0
    for name, parameter in parameters:
        count += 1
        low, high = torch.aminmax(parameter.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            cause = f"the {whose}'s {name} holds values that are not finite"
        elif not name.endswith("bias") and not bool(low.any() | high.any()):
            cause = f"the {whose}'s {name} is all zero"
        if cause:
            break
    return fault(f"{whose}'s weights", cause, f"{count} tensors: finite, none all zero")


def _hidden_bsh(seen: Seen, whose: str) -> torch.Tensor:
    batch, length = seen.tokens_bs.shape
    return seen.heads[whose].rows().double().view(batch, length, -1)


def _shift(tokens: list[int], labels: list[int], unmasked: list[bool], what: str) -> str | None:
    """What is wrong with labels of one row; where they are masked they may be anything."""

    def agreement(shift: int) -> float:
        pairs = [
            (labels[i], tokens[i + shift])
            for i in range(len(tokens) - shift)
            if unmasked[i] and i + shift < len(tokens)
        ]
        return sum(a == b for a, b in pairs) / max(len(pairs), 1)

    if agreement(1) == 1:
        return None
    by = {shift: agreement(shift) for shift in (0, 2, 3)}
    likely = max(by, key=by.__getitem__)
    if by[likely] > 0.9:
        times = {0: "not shifted", 2: "shifted twice", 3: "shifted three times"}[likely]
        return f"{what} are {times}: each must be the token after, shifted once"
    return f"{what} are not the next tokens ({1 - agreement(1):.1%} are others)"


def _positions(positions_bs: torch.Tensor) -> str | None:
    for row in positions_bs.tolist():
        if row[0] != 0:
            return f"position ids begin at {row[0]}, not 0"
        for before, after in itertools.pairwise(row):
            if after not in (before + 1, 0):
                return f"position id {after} comes after {before}: must be {before + 1}"
    return None
