"""The Pareto front: students to which no other is preferable in everything at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def dominated_by(
    points: Sequence[Mapping[str, float]], lower_is_better: Mapping[str, bool]
) -> list[int | None]:
    """Who dominates whom.

    A point dominates another if it is no worse in any axis, and better in one.

    Args:
        points: axis -> value of each.
        lower_is_better: the axes that count, each of which all points have.

    Returns:
        For each point the first one of the front that dominates it; None on the front.
    """
    costs = [
        tuple(point[axis] if lower else -point[axis] for axis, lower in lower_is_better.items())
        for point in points
    ]
    front = [p for p in costs if not any(_dominates(other, p) for other in costs)]
    return [
        next((costs.index(other) for other in front if _dominates(other, point)), None)
        for point in costs
    ]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)
