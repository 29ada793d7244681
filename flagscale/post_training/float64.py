"""The losses of a micro-batch once more: plainly, in float64, from hidden states.

A few rows of logits at a time, whole rows on every rank: no vocabulary-sized buffer is held, and
what a rank holds of the vocabulary, in which order it is worked off, and how gradients are had
plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from flagscale.post_training.divergences.reference import reference_loss, reference_sparse_loss
from flagscale.post_training.tap import STUDENT, TEACHER, Head, Seen
from flagscale.recipe import DistillationRecipe

# float64 numbers in one buffer of logits, of which there are about eight: 64 MiB, 512 MiB in all.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
_ROWS, _COLUMNS = 64, 4096  # that `loss_and_entropy` works off at a time

# (student's logits, teacher's logits) [n, V] -> [n]
Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sum:
    """A sum over the unmasked tokens.

    Attributes:
        value: float64's.
        rounding: what it changes by, at most, where logits are stored in the model's dtype: the sum
            of each token's change.
    """

    value: float
    rounding: float


def divergence(recipe: DistillationRecipe) -> Divergence:
    """The recipe's divergence of two rows of logits, `T^2` included, by its definition."""
    return partial(reference_loss, recipe=recipe)


def cross_entropy(logits_nv: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
    """The LM loss of each row, nats."""
    picked_n = logits_nv.gather(-1, labels_n[:, None]).squeeze(-1)
    return logits_nv.logsumexp(-1) - picked_n


@torch.no_grad()
def divergence_sum(seen: Seen, function: Divergence) -> Sum:
    """Sum a divergence of the two models over the unmasked tokens.

    All ranks that share the vocabulary call it.
    """
    value = rounding = 0.0
    for _, mask_n, (student_nv, teacher_nv) in _chunks(seen, STUDENT, TEACHER):
        loss_n = function(student_nv, teacher_nv)
        value += (loss_n * mask_n).sum().item()
        stored_s, stored_t = (
            _stored(student_nv, seen.heads[STUDENT]),
            _stored(teacher_nv, seen.heads[TEACHER]),
        )
        if stored_s is not student_nv or stored_t is not teacher_nv:
            rounding += ((loss_n - function(stored_s, stored_t)).abs() * mask_n).sum().item()
    return Sum(value, rounding)


@torch.no_grad()
def sparse_sum(seen: Seen, recipe: DistillationRecipe) -> Sum:
    """The same of a teacher that gives the probabilities of some tokens, `seen.targets`."""
    top_k = recipe.top_k if recipe.divergence == "top_k_kl" else None
    value = rounding = 0.0
    for index_n, mask_n, (student_nv,) in _chunks(seen, STUDENT):
        assert seen.targets is not None, "the teacher gives logits"
        targets = seen.targets[index_n]
        loss_n = reference_sparse_loss(student_nv, targets, recipe.temperature, top_k)
        value += (loss_n * mask_n).sum().item()
        stored_nv = _stored(student_nv, seen.heads[STUDENT])
        if stored_nv is not student_nv:
            stored_n = reference_sparse_loss(stored_nv, targets, recipe.temperature, top_k)
            rounding += ((loss_n - stored_n).abs() * mask_n).sum().item()
    return Sum(value, rounding)


@torch.no_grad()
def row_sum(
    seen: Seen,
    whose: str,
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    labels_bs: torch.Tensor | None = None,
) -> Sum:
    """Sum a function of (logits, labels) of one model's rows over the unmasked tokens.

    Args:
        seen: the micro-batch.
        whose: `student` or `teacher`.
        function: gives a figure a row.
        labels_bs: default: those seen.
    """
    labels_n = (seen.labels_bs if labels_bs is None else labels_bs).flatten()
    value = rounding = 0.0
    for index_n, mask_n, (logits_nv,) in _chunks(seen, whose):
        loss_n = function(logits_nv, labels_n[index_n])
        value += (loss_n * mask_n).sum().item()
        stored_nv = _stored(logits_nv, seen.heads[whose])
        if stored_nv is not logits_nv:
            stored_n = function(stored_nv, labels_n[index_n])
            rounding += ((loss_n - stored_n).abs() * mask_n).sum().item()
    return Sum(value, rounding)


@torch.no_grad()
def loss_and_entropy(seen: Seen, whose: str) -> tuple[float, float]:
    """Of one model's unmasked rows, weighed by the mask: LM loss, and entropy; sums, nats.

    Columns pass by: no row is ever whole. All ranks that share the vocabulary call it.
    """
    head = seen.heads[whose]
    mask_n = seen.mask_bs.flatten().double()
    index_n = mask_n.nonzero().squeeze(-1)
    rows_nh, labels_n = head.rows()[index_n], seen.labels_bs.flatten()[index_n]
    parts = [
        _row_sums(head, some_nh, some_n)
        for some_nh, some_n in zip(rows_nh.split(_ROWS), labels_n.split(_ROWS), strict=True)
    ]
    local = torch.cat(parts, dim=-1)
    ranks = [torch.empty_like(local) for _ in range(head.group.size())]
    torch.distributed.all_gather(ranks, local, group=head.group)
    largest, exps, products, picked = torch.stack(ranks, dim=1)
    top_n = largest.amax(0)
    share = (largest - top_n).exp()
    total_n = (exps * share).sum(0)
    normaliser_n = top_n + total_n.log()
    entropy_n = normaliser_n - (products * share).sum(0) / total_n
    loss_n = normaliser_n - picked.sum(0)
    weights_n = mask_n[index_n]
    return (loss_n * weights_n).sum().item(), (entropy_n * weights_n).sum().item()


def _row_sums(head: Head, rows_nh: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
    """Of this rank's columns z, [4, n]: max, sum e^(z - max), sum e^(z - max) z, the label's z."""
    first = head.group.rank() * head.weight_vh.size(0)
    weight_vh = head.weight_vh.detach()[: max(head.vocab_size - first, 0)]
    rows_nh = rows_nh.double()
    found = torch.zeros(4, rows_nh.size(0), dtype=torch.float64, device=rows_nh.device)
    found[0] = -1e30  # no column yet, and finite
    for start in range(0, weight_vh.size(0), _COLUMNS):
        z_nv = rows_nh @ weight_vh[start : start + _COLUMNS].double().T
        largest_n = torch.maximum(found[0], z_nv.amax(-1))
        shrunk_n = (found[0] - largest_n).exp()
        exps_nv = (z_nv - largest_n[:, None]).exp()
        found[1] = found[1] * shrunk_n + exps_nv.sum(-1)
        found[2] = found[2] * shrunk_n + (exps_nv * z_nv).sum(-1)
        found[0] = largest_n
        place_n = labels_n - first - start
        here_n = (place_n >= 0) & (place_n < z_nv.size(-1))
        z_n = z_nv.gather(-1, place_n.clamp(0, z_nv.size(-1) - 1)[:, None]).squeeze(-1)
        found[3] += torch.where(here_n, z_n, 0.0)
    return found


def hidden_gradient(seen: Seen, function: Divergence, *, stored: bool = False) -> torch.Tensor:
    """The gradient of the divergence's sum in what the student's output layer is given.

    Args:
        seen: the micro-batch.
        function: the divergence.
        stored: of logits as the models store them.

    Returns:
        float64 [b * s, h], whole on every rank that shares the vocabulary.
    """
    head = seen.heads[STUDENT]
    gradient_nh = torch.zeros_like(head.rows(), dtype=torch.float64)
    for index_n, mask_n, (student_nv, teacher_nv) in _chunks(seen, STUDENT, TEACHER):
        if stored:
            student_nv = _stored(student_nv, head)
            teacher_nv = _stored(teacher_nv, seen.heads[TEACHER])
        leaf_nv = student_nv.detach().requires_grad_(True)
        (function(leaf_nv, teacher_nv) * mask_n).sum().backward()
        assert leaf_nv.grad is not None
        gradient_nh[index_n] = _through(head, leaf_nv.grad)
    if head.group.size() > 1:
        torch.distributed.all_reduce(gradient_nh, group=head.group)
    return gradient_nh


def some_logits(seen: Seen, count: int) -> list[torch.Tensor]:
    """float64 [n, V] of both models, the student first: the first unmasked rows, at most `count`.

    All ranks that share the vocabulary call it, and get whole rows.
    """
    _, _, logits = next(_chunks(seen, STUDENT, TEACHER))
    return [logits_nv[:count] for logits_nv in logits]


def _through(head: Head, gradient_nv: torch.Tensor) -> torch.Tensor:
    """This rank's share of the gradient in hidden states, from that in whole rows of logits."""
    size = head.weight_vh.size(0)
    first = head.group.rank() * size
    own_nv = gradient_nv[:, first : first + size]
    weight_vh = head.weight_vh.detach()[: own_nv.size(1)]
    result = torch.zeros(
        gradient_nv.size(0), weight_vh.size(1), dtype=torch.float64, device=gradient_nv.device
    )
    for part_nv, part_vh in zip(
        own_nv.split(_COLUMNS, dim=1), weight_vh.split(_COLUMNS), strict=True
    ):
        result += part_nv @ part_vh.double()
    return result


def _chunks(
    seen: Seen, *whose: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    """Of the unmasked rows, some at a time: which, their masks, each model's float64 logits.

    The models' vocabularies may be padded differently: as many columns as both know.
    """
    heads = [seen.heads[name] for name in whose]
    rows = [head.rows() for head in heads]
    mask_n = seen.mask_bs.flatten().double()
    width = max(head.weight_vh.size(0) * head.group.size() for head in heads)
    step = max(1, _CHUNK_ELEMENTS.get(mask_n.device.type, 2**20) // width)
    known = min(head.vocab_size for head in heads)
    for index_n in mask_n.nonzero().squeeze(-1).split(step):
        logits = [head.logits(row[index_n]) for head, row in zip(heads, rows, strict=True)]
        yield index_n, mask_n[index_n], [one_nv[:, :known] for one_nv in logits]


def _stored(logits_nv: torch.Tensor, head: Head) -> torch.Tensor:
    """As the model stores them; the same tensor where that rounds no more than sums do anyway."""
    return logits_nv if head.dtype.itemsize > 2 else logits_nv.to(head.dtype).double()
