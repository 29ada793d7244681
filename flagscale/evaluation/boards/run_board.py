"""Students of many runs side by side: leaderboards of those that can be compared, Pareto fronts.

Runs are compared if they measured the same documents in the same windows with the same teacher.
Those of an experiment that did not make a board of their own each, or are told as alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flagscale.errors import UserError
from flagscale.evaluation.boards.leaderboard import Candidate, Leaderboard, Row, rank
from flagscale.evaluation.boards.pareto import dominated_by
from flagscale.evaluation.compare import check_same
from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.figures import SHOWN
from flagscale.evaluation.tasks.columns import TaskColumn, task_columns
from flagscale.evaluation.tasks.scores import TaskScores

QUALITY = "quality"


@dataclass(frozen=True)
class Axis:
    """What a student costs whoever uses or makes it.

    Attributes:
        label: for people.
        lower_is_better: direction.
    """

    label: str
    lower_is_better: bool = True


AXES = {
    "exported_bytes": Axis("Size of the export, MB"),
    "parameters": Axis("Size, parameters"),
    "decode_tokens_per_second": Axis("Speed of generation, tokens/s", lower_is_better=False),
    "flops_a_token": Axis("Work of a token, MFLOPs"),
    "price": Axis("Price of the training"),
    "training_rank_seconds": Axis("Training, rank-seconds"),
}
# Size, speed and cost: of each the first measure that all students of a board have.
_ASKED = (
    ("exported_bytes", "parameters"),
    ("decode_tokens_per_second", "flops_a_token"),
    ("price", "training_rank_seconds"),
)
MISSING = dict(zip(("size", "speed", "cost"), map(set, _ASKED), strict=True))
SCALES = {"exported_bytes": 1e6, "flops_a_token": 1e6}  # of the units that labels name


@dataclass(frozen=True)
class Student:
    """A student that a run has measured.

    Attributes:
        name: of the run.
        run_id: of its evaluation in MLflow.
        sections: `section.field` -> value of the recipe, flat.
        origin: which student the training began with; equal where it was the same one.
        metrics: of its evaluation (metrics.json).
        fidelity: its sums per document.
        axes: of `AXES` those that are known.
        digests: of the evaluation and of the distilled student.
        tasks: what it scored on tasks, and its teacher, if they were asked.
    """

    name: str
    run_id: str
    sections: Mapping[str, str]
    origin: str
    metrics: Mapping[str, Any]
    fidelity: Fidelity
    axes: Mapping[str, float]
    digests: Mapping[str, str]
    tasks: Sequence[TaskScores] = ()


@dataclass(frozen=True)
class Place:
    """Where a student stands in quality, size, speed and cost together.

    Attributes:
        values: axis -> value, with `QUALITY`.
        dominated_by: number of a student that is no worse in anything and better in something;
            None on the Pareto front.
        is_clear: whether the other's quality is told from this one's; else it may be chance.
    """

    values: Mapping[str, float]
    dominated_by: int | None
    is_clear: bool


@dataclass(frozen=True)
class Board:
    """Students that can be compared.

    Attributes:
        students: in the order of their numbers, from 1.
        leaderboard: the same, best first.
        axes: that all of them have: `QUALITY`, then of `AXES` one each of size, speed and cost.
        places: number -> place.
        tasks: that at least two of them were asked, with the same examples.
    """

    students: tuple[Student, ...]
    leaderboard: Leaderboard
    axes: tuple[str, ...]
    places: Mapping[int, Place]
    tasks: tuple[TaskColumn, ...] = ()

    def student(self, row: Row) -> Student:
        """Of a row of the leaderboard."""
        return self.students[row.number - 1]

    @property
    def varied(self) -> tuple[str, ...]:
        """The recipes' fields that are not the same everywhere."""
        return tuple(self.leaderboard.winner.changes)


def boards(
    students: Sequence[Student], metric: str, confidence: float | None = None
) -> list[Board]:
    """Put students side by side that can be compared; the largest board first.

    Args:
        students: at least one, the oldest first.
        metric: figure that orders, one of `flagscale.evaluation.fidelity.FIGURES`.
        confidence: mass of the intervals; None: the largest of the evaluations.
    """
    groups: list[list[Student]] = []
    for student in students:
        fitting = next((group for group in groups if _is_comparable(group[0], student)), None)
        if fitting is None:
            groups.append([student])
        else:
            fitting.append(student)
    groups.sort(key=len, reverse=True)
    return [_board(group, metric, confidence) for group in groups]


def _is_comparable(a: Student, b: Student) -> bool:
    try:
        check_same(Path(a.name), Path(b.name), a.metrics, b.metrics, a.fidelity, b.fidelity)
    except UserError:
        return False
    return True


def _board(group: Sequence[Student], metric: str, confidence: float | None) -> Board:
    settings = {
        "bootstrap_samples": max(one.metrics["bootstrap_samples"] for one in group),
        "confidence": confidence or max(one.metrics["confidence"] for one in group),
        "seed": 0,
    }
    changes = _changes(group)
    candidates = [
        Candidate(
            number=number,
            name=one.name,
            changes=changes[number - 1],
            origin=one.origin,
            metrics={**one.metrics, **settings},
            fidelity=one.fidelity,
            tokens_per_second=one.axes.get("decode_tokens_per_second", 0.0),
            source=Path(one.name),
            digests=one.digests,
        )
        for number, one in enumerate(group, start=1)
    ]
    leaderboard = rank(candidates, metric)
    axes = (QUALITY, *_axes(group))
    return Board(
        students=tuple(group),
        leaderboard=leaderboard,
        axes=axes,
        places=_places(group, candidates, leaderboard, axes),
        tasks=task_columns(
            {row.number: group[row.number - 1].tasks for row in leaderboard.rows},
            settings["bootstrap_samples"],
            settings["confidence"],
        ),
    )


def _axes(group: Sequence[Student]) -> list[str]:
    known = [name for name in AXES if all(name in one.axes for one in group)]
    found = [next((name for name in one if name in known), None) for one in _ASKED]
    return [name for name in found if name is not None]


def _changes(group: Sequence[Student]) -> list[dict[str, Any]]:
    fields = list(dict.fromkeys(field for one in group for field in one.sections))
    varied = [f for f in fields if len({one.sections.get(f) for one in group}) > 1]
    return [{f: one.sections.get(f, "none") for f in varied} for one in group]


def _places(
    group: Sequence[Student],
    candidates: Sequence[Candidate],
    leaderboard: Leaderboard,
    axes: Sequence[str],
) -> dict[int, Place]:
    metric = leaderboard.metric
    quality = {row.number: row.figures[metric]["value"] for row in leaderboard.rows}
    lower = {QUALITY: SHOWN[metric].lower_is_better}
    lower |= {name: AXES[name].lower_is_better for name in axes if name != QUALITY}
    points = [
        {QUALITY: quality[number], **{name: one.axes[name] for name in axes if name != QUALITY}}
        for number, one in enumerate(group, start=1)
    ]
    found: dict[int, Place] = {}
    for number, (point, by) in enumerate(
        zip(points, dominated_by(points, lower), strict=True), start=1
    ):
        other = None if by is None else by + 1
        is_clear = other is not None and _is_clear(candidates, number, other, metric)
        found[number] = Place(point, other, is_clear)
    return found


def _is_clear(candidates: Sequence[Candidate], number: int, other: int, metric: str) -> bool:
    """Whether the second's figure is told from the first's, paired by document."""
    pair = [replace(candidates[n - 1], number=n) for n in (number, other)]
    rows = rank(pair, metric).rows
    return rows[1].number == number and rows[1].verdict == "worse"
