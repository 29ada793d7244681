"""Sizes for a student that is to come to a target: parameters, memory, speed.

From the teacher's shape and the recipe alone, so that plans know the student before anything runs,
and every step finds the same. Of all students on a grid that meet the targets and come near them,
the one is taken whose sizes hurt least (`_harm`). The grid's bounds are ModelOpt's for its search
by parameters: at most 40% of a width and, where widths are cut too, 20% of the layers.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cache

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.models.cut_shape import (
    OF_WHOLE_ROWS,
    WHOLE_ROWS,
    check_cut,
    cut_shape,
    heads_fit,
    widths,
)
from flagscale.recipe import StudentRecipe
from flagscale.recipe.targets import TARGETS
from flagscale.sizes.use import (
    active_in_use,
    memory_in_use,
    parameters_in_use,
    seconds_a_token,
    weight_bytes,
)

Sizes = dict[str, int]

_NEAR = 0.98  # of the nearest to the target: among these, the least harm decides
_DEPTH_BESIDE_WIDTH, _WIDTH = 0.2, 0.4  # the most that goes, unless the recipe says otherwise
# Nats a token that a cut costs before training, over ln(teacher's / student's) to the power: of
# SmolLM2, one size cut alone (`docs/benchmarks.md`). For experts, an MLP's is taken.
_HARM = {
    "num_layers": 8.0,
    "hidden_size": 15.0,
    "num_attention_heads": 8.6,
    "ffn_hidden_size": 2.2,
    "moe_ffn_hidden_size": 2.2,
    "num_experts": 2.2,
}
_POWER = 1.5
# ModelOpt's divisors, the most that sizes are multiples of; smaller models have smaller ones.
_MULTIPLES = {"hidden_size": 256, "ffn_hidden_size": 512, "moe_ffn_hidden_size": 512}
_STEPS = 16


def meet_targets(teacher: ModelShape, student: StudentRecipe) -> StudentRecipe:
    """The recipe with sizes in place of its targets; itself, if it has none.

    Args:
        teacher: its shape.
        student: sizes that it gives stay as they are.

    Raises:
        UserError: no student meets the targets within the bounds, with the nearest that there is;
            or the teacher itself does.
    """
    return _solved(teacher, student) if student.has_target else student


@cache
def _solved(teacher: ModelShape, student: StudentRecipe) -> StudentRecipe:
    check_cut(teacher, student.given_widths)
    costs = _Costs(teacher, student)
    whole = {"num_layers": teacher.num_layers} | widths(teacher)
    if costs.of(whole) <= 1:
        raise UserError(
            f"student.{costs.asked}: the teacher meets it as it is ({costs.shown(whole)}); ask for "
            "less, or set init=same"
        )
    candidates = list(_candidates(teacher, student, costs.of))
    fitting = [(cost, sizes) for cost, sizes in candidates if cost <= 1]
    if not fitting:
        asked = {"init": student.init, **_limits(student)}
        nearest = min(candidates, key=lambda found: found[0])[1]
        raise UserError(
            f"student.{costs.asked} cannot be met with {_named(asked)}: the nearest is "
            f"{_named(nearest)}, with {costs.shown(nearest)}; ask for that, or allow more to go"
        )
    nearest_cost = max(cost for cost, _ in fitting)
    near = [found for found in fitting if found[0] >= _NEAR * nearest_cost]
    _, sizes = min(near, key=lambda found: (_harm(whole, found[1]), -found[0]))
    cleared = dict.fromkeys((*TARGETS, "target_platform", "max_depth_pruning", "max_width_pruning"))
    return StudentRecipe.model_validate(
        student.model_dump(exclude=set(cleared) | {"target_seq_length"}) | sizes
    )


def _candidates(
    teacher: ModelShape, student: StudentRecipe, cost: Callable[[Sizes], float]
) -> Iterator[tuple[float, Sizes]]:
    """The students of the grid that are as large as the targets let them be, with their costs.

    For each choice of all sizes but the last, that is the largest last that meets the targets, or
    else the smallest.
    """
    *first, (last, choices) = _grid(teacher, student).items()
    for chosen in itertools.product(*(sizes for _, sizes in first)):
        sizes = dict(zip((name for name, _ in first), chosen, strict=True))
        hidden = sizes.get("hidden_size", teacher.hidden_size)
        heads = sizes.get("num_attention_heads", teacher.num_attention_heads)
        if not heads_fit(teacher.model_type, hidden, heads):
            continue
        at = bisect_right(choices, 1.0, key=lambda size: cost(sizes | {last: size}))
        best = sizes | {last: choices[max(at - 1, 0)]}
        yield cost(best), best


def _grid(teacher: ModelShape, student: StudentRecipe) -> dict[str, list[int]]:
    """What each size may become, rising."""
    limits = _limits(student)
    depth, width = (limits.get(f"max_{what}_pruning") for what in ("depth", "width"))
    grid: dict[str, list[int]] = {}
    if student.cuts_depth:
        given = student.num_layers or len(student.keep_layers or ()) or None
        grid["num_layers"] = _choices(teacher.num_layers, 1, depth, given)
    if student.cuts_width:
        for name, size in widths(teacher).items():
            step = _step(teacher, name, size)
            grid[name] = _choices(size, step, width, getattr(student, name))
        if teacher.architecture.num_experts is not None:
            fewest = teacher.architecture.moe_router_topk
            grid["num_experts"] = [count for count in grid["num_experts"] if count >= fewest]
    return grid


def _choices(size: int, step: int, most_pruned: float | None, given: int | None) -> list[int]:
    if given is not None:
        return [given]
    fewest = step
    if most_pruned is not None:
        fewest = max(step, math.ceil(size * (1 - most_pruned) - 1e-9))
    return [*(choice for choice in range(step, size, step) if choice >= fewest), size]


def _step(teacher: ModelShape, name: str, size: int) -> int:
    """What a size goes down by: tensor cores like powers of two, and heads must come out whole."""
    if name == "num_attention_heads":
        return teacher.num_query_groups
    power = 2 ** max(0, int(math.log2(max(1, size // _STEPS))))
    power = min(power, _MULTIPLES.get(name, power))
    if teacher.architecture.num_experts is not None and name in OF_WHOLE_ROWS:
        return max(power, WHOLE_ROWS)
    heads = teacher.num_attention_heads
    if name == "hidden_size" and not heads_fit(teacher.model_type, power, heads):
        # Whole heads: with the largest power of two that leaves enough steps.
        while power > 1 and math.lcm(power, heads) > size // (_STEPS // 2):
            power //= 2
        return math.lcm(power, heads)
    return power


class _Costs:
    """What a student takes of its targets: above 1 it misses one. Costs rise with every size."""

    def __init__(self, teacher: ModelShape, student: StudentRecipe) -> None:
        self._teacher, self._student = teacher, student
        self._of_layers: dict[tuple[tuple[str, int], ...], tuple[list[float], list[float]]] = {}

    @property
    def asked(self) -> str:
        """The targets as the recipe has them."""
        given = [(name, getattr(self._student, name)) for name in TARGETS]
        return ", ".join(f"{name}={value:g}" for name, value in given if value is not None)

    def of(self, sizes: Mapping[str, int]) -> float:
        """The largest share of a target.

        Layers are alike: figures of one and of two of them give those of any number.
        """
        widths_alone = {name: size for name, size in sizes.items() if name != "num_layers"}
        key = tuple(widths_alone.items())
        if key not in self._of_layers:
            one, two = (
                self._shares(cut_shape(self._teacher, widths_alone | {"num_layers": count}))
                for count in (1, 2)
            )
            self._of_layers[key] = one, two
        one, two = self._of_layers[key]
        more = sizes.get("num_layers", self._teacher.num_layers) - 1
        return max(a + more * (b - a) for a, b in zip(one, two, strict=True))

    def _shares(self, shape: ModelShape) -> list[float]:
        student, shares = self._student, []
        if student.target_parameters is not None:
            shares.append(parameters_in_use(shape) / student.target_parameters)
        if student.target_active_parameters is not None:
            shares.append(active_in_use(shape) / student.target_active_parameters)
        platform, seq_length = student.target_platform or "", student.target_seq_length
        if student.target_memory is not None:
            used = memory_in_use(shape, seq_length, weight_bytes(platform))
            shares.append(used / (1e9 * student.target_memory))
        if student.target_speed is not None:
            shares.append(student.target_speed * seconds_a_token(shape, seq_length, platform))
        return shares

    def shown(self, sizes: Mapping[str, int]) -> str:
        """The figures of a student that the targets are about."""
        shape, student = cut_shape(self._teacher, sizes), self._student
        platform, seq_length = student.target_platform or "", student.target_seq_length
        memory = memory_in_use(shape, seq_length, weight_bytes(platform))
        figures = {
            "target_parameters": lambda: f"{parameters_in_use(shape):,} parameters",
            "target_active_parameters": lambda: f"{active_in_use(shape):,} active parameters",
            "target_memory": lambda: f"{memory / 1e9:.3g} GB",
            "target_speed": lambda: (
                f"{1 / seconds_a_token(shape, seq_length, platform):,.0f} tokens/s"
            ),
        }
        return ", ".join(
            figure() for name, figure in figures.items() if getattr(student, name) is not None
        )


def _harm(whole: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """How far a student starts from its teacher, nats a token, by `_HARM`."""
    return sum(_HARM[name] * math.log(whole[name] / size) ** _POWER for name, size in sizes.items())


def _named(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _limits(student: StudentRecipe) -> dict[str, float]:
    """The most that may go, by the recipe's names; without one, anything may."""
    depth, width = student.max_depth_pruning, student.max_width_pruning
    if depth is None and student.cuts_depth and student.cuts_width:
        depth = _DEPTH_BESIDE_WIDTH
    if width is None and student.cuts_width:
        width = _WIDTH
    limits = {"max_depth_pruning": depth, "max_width_pruning": width}
    return {name: limit for name, limit in limits.items() if limit is not None}
