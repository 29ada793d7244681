"""Terms of layers' outputs and attentions once more, in float64, from what the layers were seen do.

Plainly, on the last pipeline stage, which is sent what the others saw: how terms travel between
stages, how ranks share heads and positions, and how rows are worked off plays no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from flagscale.post_training.findings import Finding, within
from flagscale.post_training.intermediate_terms import intermediate_terms
from flagscale.post_training.tap import STUDENT, TEACHER, Layer, Seen, Tap
from flagscale.recipe import DistillationRecipe

_HIDDEN, _ATTENTION = "intermediate distillation loss", "attention distillation loss"
_RELATIVE, _PER_TOKEN = 1e-4, 1e-5  # as of other losses
_PROJECTED = 0.02  # where a projection's result is stored in 16 bits
_SCORES = 2**21  # in one buffer, float64, of which there are about six

Projections = dict[int, tuple[torch.Tensor, torch.Tensor]]  # of a pair's number: weight and bias


def seen_layers(recipe: DistillationRecipe | None) -> list[Layer]:
    """What `check_layers` needs a tap to keep.

    Args:
        recipe: the distillation, if it is one.
    """
    if recipe is None:
        return []
    wanted = [
        (whose, name, "output")
        for pair in recipe.intermediate_layer_pairs
        for whose, name in zip((STUDENT, TEACHER), pair[:2], strict=True)
    ]
    wanted += [
        _attention_input(whose, layer, part)
        for pair in recipe.attention_layer_pairs
        for whose, layer in zip((STUDENT, TEACHER), pair, strict=True)
        for relation in recipe.attention_relations
        for part in relation.split("_")
    ]
    return list(dict.fromkeys(wanted))


def check_layers(tap: Tap, recipe: DistillationRecipe | None, model: GPTModel) -> list[Finding]:
    """The means of the intermediate and of the attention terms are float64's. All ranks call it.

    Args:
        tap: that kept `seen_layers` of a micro-batch.
        recipe: the distillation, if it is one.
        model: this rank's part, converted for distillation.

    Returns:
        On the last pipeline stage one finding a kind of term that the recipe has.
    """
    if not seen_layers(recipe):
        return []
    assert recipe is not None, "it has pairs"
    layers, projections = _of_all_stages(tap.layers, model)
    if tap.seen is None:  # not the last stage
        return []
    found, in_16_bits = [], tap.seen.heads[STUDENT].dtype.itemsize == 2
    if recipe.intermediate_layer_pairs:
        relative = _PROJECTED if in_16_bits and projections else _RELATIVE
        expected = _hidden_sum(tap.seen, recipe, layers, projections)
        found.append(_against("intermediate loss", _HIDDEN, tap.seen, expected, relative))
    if recipe.attention_layer_pairs:
        expected = _attention_sum(tap.seen, recipe, layers, model)
        found.append(_against("attention loss", _ATTENTION, tap.seen, expected, _RELATIVE))
    return found


def _against(check: str, name: str, seen: Seen, expected: float, relative: float) -> Finding:
    unmasked = max(seen.mask_bs.double().sum().item(), 1)
    expected, reported = expected / unmasked, seen.report[name][0] / unmasked
    cause = f"the {name} is reported as {reported:.6g} a token, but is {expected:.6g} in float64 "
    cause += "from what the same layers computed"
    allowed = relative * abs(expected) + _PER_TOKEN
    return within(check, reported - expected, allowed, "mean of its terms, to float64's", cause)


def _of_all_stages(
    layers: dict[Layer, torch.Tensor], model: GPTModel
) -> tuple[dict[Layer, torch.Tensor], Projections]:
    """What the stages of this pipeline saw and project with, on its last one; all call it."""
    linears: dict[str, Any] = dict(intermediate_terms(model).projections.items())
    projections = {
        int(number): (one.weight.detach(), one.bias.detach()) for number, one in linears.items()
    }
    group = parallel_state.get_pipeline_model_parallel_group()
    last = group.size() - 1
    if last == 0:
        return layers, projections
    on_cpu = {key: tensor.cpu() for key, tensor in layers.items()}
    mine = on_cpu, {number: (w.cpu(), b.cpu()) for number, (w, b) in projections.items()}
    told = [mine] * group.size() if group.rank() == last else None
    torch.distributed.gather_object(mine, told, group=group, group_dst=last)
    for theirs, more in (told or [])[:-1]:
        layers |= theirs
        projections |= more
    return layers, projections


def _hidden_sum(
    seen: Seen,
    recipe: DistillationRecipe,
    layers: dict[Layer, torch.Tensor],
    projections: Projections,
) -> float:
    """Mean of the terms, of each the sum over this rank's unmasked tokens."""
    head = seen.heads[STUDENT]
    mask_n = seen.mask_bs.flatten().double()
    sums = []
    for number, (ours, theirs, *fit) in enumerate(recipe.intermediate_layer_pairs):
        student_nh, teacher_nh = (
            head.whole(layers[whose, name, "output"].to(mask_n.device)).double()
            for whose, name in ((STUDENT, ours), (TEACHER, theirs))
        )
        if number in projections:
            weight, bias = (one.to(mask_n).double() for one in projections[number])
            student_nh = student_nh @ weight.T + bias
        if fit == ["mse"]:
            loss_n = (student_nh - teacher_nh).square().mean(-1)
        else:
            sizes_n = student_nh.norm(dim=-1) * teacher_nh.norm(dim=-1)
            loss_n = 1 - (student_nh * teacher_nh).sum(-1) / sizes_n
        sums.append((loss_n * mask_n).sum().item())
    return sum(sums) / len(sums)


@dataclass(frozen=True)
class _Attention:
    """Inputs of core attention [b, s, channels of all heads], as the models store them.

    Attributes:
        rows: of this rank's positions.
        columns: of all positions, in order.
    """

    rows: torch.Tensor
    columns: torch.Tensor


def _attention_sum(
    seen: Seen, recipe: DistillationRecipe, layers: dict[Layer, torch.Tensor], model: GPTModel
) -> float:
    """Mean of the terms, of each the sum over this rank's unmasked tokens."""
    heads = recipe.attention_relation_heads or model.config.num_attention_heads
    sums = []
    for pair in recipe.attention_layer_pairs:
        for relation in recipe.attention_relations:
            row, *column = relation.split("_")
            sides = []
            for whose, layer in zip((STUDENT, TEACHER), pair, strict=True):
                config = (model if whose == STUDENT else model.teacher_model).config
                rows, columns = (
                    _all_heads(layers[_attention_input(whose, layer, part)], config, seen)
                    for part in (row, column[0] if column else row)
                )
                sides.append(_Attention(rows, _all_positions(columns, seen)))
            sums.append(_relation_sum(seen, sides, heads, recipe.attention_fit))
    return sum(sums) / len(sums)


def _relation_sum(seen: Seen, sides: Sequence[_Attention], heads: int, fit: str) -> float:
    total = 0.0
    for here, sees_bts in _rows(seen, heads):
        s, t = (_scores(side, here, heads, sees_bts) for side in sides)  # [b, heads, rows, columns]
        sees = sees_bts[:, None]
        if fit == "mse":
            squares = torch.where(sees, (s - t).square(), 0.0)
            loss_bhs = squares.sum(-1) / sees.sum(-1)
        else:
            p, q = t.softmax(-1), s.softmax(-1)
            if fit == "kl":
                logs = t.log_softmax(-1) - s.log_softmax(-1)
                loss_bhs = (p * torch.where(sees, logs, 0.0)).sum(-1)
            else:
                loss_bhs = 1 - (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1))
        total += (loss_bhs.mean(1) * seen.mask_bs[:, here].double()).sum().item()
    return total


def _rows(seen: Seen, heads: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some of this rank's rows at a time, and which of all positions each sees: [b, rows, s]."""
    batch, count = seen.positions_bs.shape
    context = parallel_state.get_context_parallel_group()
    columns = torch.arange(count * context.size(), device=seen.positions_bs.device)
    # A rank's share of the sequence is not one run of it; documents are whole.
    places_bs = seen.positions_bs if context.size() > 1 else columns.expand(batch, -1)
    first_bs = places_bs - seen.positions_bs if seen.is_packed else torch.zeros_like(places_bs)
    step = max(1, _SCORES // (batch * heads * len(columns)))
    for start in range(0, count, step):
        here = slice(start, start + step)
        sees = columns <= places_bs[:, here, None]
        yield here, sees & (columns >= first_bs[:, here, None])


def _scores(side: _Attention, here: slice, heads: int, sees: torch.Tensor) -> torch.Tensor:
    rows, columns = (
        one.double().unflatten(-1, (heads, -1)) for one in (side.rows[:, here], side.columns)
    )
    scores = torch.einsum("bshc,bthc->bhst", rows, columns) / rows.size(-1) ** 0.5
    return scores.masked_fill(~sees[:, None], -torch.inf)


def _attention_input(whose: str, layer: int, part: str) -> Layer:
    return whose, f"decoder.layers.{layer}.self_attention.core_attention", part


def _all_heads(part_sbgc: torch.Tensor, config: object, seen: Seen) -> torch.Tensor:
    """[b, s, channels] of all ranks' heads; each has the keys and values of its group."""
    group = seen.heads[STUDENT].group
    count = config.num_attention_heads // group.size()  # type: ignore[attr-defined]
    used = torch.arange(count) * part_sbgc.size(2) // count
    part_bsc = part_sbgc.to(seen.mask_bs.device)[:, :, used].flatten(2).transpose(0, 1)
    return _gathered(part_bsc, group, -1)


def _all_positions(part_bsc: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Of all context-parallel ranks, in order."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return part_bsc
    order = _gathered(seen.positions_bs[:1], group, 1).squeeze(0).argsort()
    return _gathered(part_bsc, group, 1)[:, order]


def _gathered(mine: torch.Tensor, group: torch.distributed.ProcessGroup, dim: int) -> torch.Tensor:
    if group.size() == 1:
        return mine
    told = [torch.empty_like(mine.contiguous()) for _ in range(group.size())]
    torch.distributed.all_gather(told, mine.contiguous(), group=group)
    return torch.cat(told, dim=dim)
