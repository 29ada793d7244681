"""The variants of a sweep, best first, measured on the same documents.

All models are resampled together, so each variant's difference to the winner is paired: what makes
a document hard for both cancels. The order in which the evaluations are given changes nothing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flagscale.errors import UserError
from flagscale.evaluation.bootstrap import Estimate
from flagscale.evaluation.compare import check_same
from flagscale.evaluation.fidelity import FIGURES, TEACHER, Fidelity
from flagscale.evaluation.figures import AFTER, BEFORE, SHOWN, differences, estimates, verdict
from flagscale.recipe.sweep import describe

_SETTINGS = ("bootstrap_samples", "confidence", "seed")
_SIZES = ("parameters", "tokens_per_second")


@dataclass(frozen=True)
class Candidate:
    """A variant that was trained and measured.

    Attributes:
        number: its place in the sweep, from 1.
        name: its name there.
        changes: `section.field` -> value, of the fields that vary.
        origin: which student the training began with; equal where it was the same one.
        metrics: of its evaluation (metrics.json).
        fidelity: its sums per document.
        tokens_per_second: median of the training's steps.
        source: the evaluation, for error messages.
        digests: of the evaluation and of the distilled student.
    """

    number: int
    name: str
    changes: Mapping[str, Any]
    origin: str
    metrics: Mapping[str, Any]
    fidelity: Fidelity
    tokens_per_second: float
    source: Path
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A variant that was not measured, because a step of it failed.

    Attributes:
        number, name, changes: as a `Candidate`'s.
        error: which step, and why.
    """

    number: int
    name: str
    changes: Mapping[str, Any]
    error: str


@dataclass(frozen=True)
class Row:
    """A variant on the leaderboard.

    Attributes:
        rank: from 1; equal where the deciding figure is.
        figures: figure -> value, low, high.
        difference: figure -> value, low, high of this variant minus the winner; paired.
        verdict: of the deciding figure, beside the winner: `worse`, `not clear`, `equal`; the
            winner's own is `best`.
        parameters: of the student.
        number, name, changes, tokens_per_second, digests: the candidate's.
    """

    rank: int
    number: int
    name: str
    changes: dict[str, Any]
    figures: dict[str, dict[str, float]]
    difference: dict[str, dict[str, float]]
    verdict: str
    parameters: int
    tokens_per_second: float
    digests: dict[str, str]


@dataclass(frozen=True)
class Leaderboard:
    """A sweep's outcome.

    Attributes:
        metric: the deciding figure.
        rows: the variants, the winner first.
        references: what they are read beside: the teacher, the students before training.
        confidence: mass of the intervals.
        documents: how many were measured.
        tokens: how many were predicted.
        bootstrap_samples: resamples of the documents.
        failed: variants that are not in `rows`.
    """

    metric: str
    rows: list[Row]
    references: dict[str, dict[str, dict[str, float]]]
    confidence: float
    documents: int
    tokens: int
    bootstrap_samples: int
    failed: tuple[Failed, ...] = ()

    @property
    def winner(self) -> Row:
        """The best; of equals the smallest student, then the first in the sweep."""
        return self.rows[0]

    def as_json(self) -> dict[str, Any]:
        """The content of leaderboard.json."""
        return asdict(self)

    def csv(self) -> str:
        """The rows for a spreadsheet: a column a varied field, three a figure."""
        stream = io.StringIO()
        table = csv.writer(stream, lineterminator="\n")
        fields = list(self.winner.changes)
        bounds = ("", "_low", "_high")
        figures = [f"{f}{bound}" for f in SHOWN for bound in bounds]
        paired = [f"{f}_minus_best{bound}" for f in FIGURES for bound in bounds]
        table.writerow(["rank", "name", *fields, *figures, *paired, "verdict", *_SIZES])
        for row in self.rows:
            values = [x for f in SHOWN for x in row.figures[f].values()]
            values += [x for f in FIGURES for x in row.difference[f].values()]
            sizes = [row.parameters, row.tokens_per_second]
            changes = [row.changes[name] for name in fields]
            table.writerow([row.rank, row.name, *changes, *values, row.verdict, *sizes])
        empty = [""] * (len(figures) + len(paired))
        for one in self.failed:
            changes = [one.changes[name] for name in fields]
            table.writerow(["", one.name, *changes, *empty, f"failed: {one.error}", "", ""])
        return stream.getvalue()


def rank(
    candidates: Sequence[Candidate], metric: str, failed: Sequence[Failed] = ()
) -> Leaderboard:
    """Order the variants by a figure.

    Args:
        candidates: at least one, in any order.
        metric: one of `FIGURES`.
        failed: variants that are told of last.

    Raises:
        UserError: they were not measured on the same documents, with the same teacher and the same
            settings.
    """
    candidates = sorted(candidates, key=lambda candidate: candidate.number)
    first = candidates[0]
    for other in candidates[1:]:
        _check(first, other)
    found = _estimates(candidates)
    sign = 1 if SHOWN[metric].lower_is_better else -1
    values = {c.number: sign * found[_after(c)][metric].value for c in candidates}
    ordered = sorted(candidates, key=lambda c: (values[c.number], _size(c), c.number))
    best, confidence = ordered[0], first.metrics["confidence"]
    rows = [
        _row(c, 1 + sum(v < values[c.number] for v in values.values()), best, found, metric)
        for c in ordered
    ]
    return Leaderboard(
        metric=metric,
        rows=rows,
        references={
            name: _intervals(found[key], confidence) for name, key in _references(candidates)
        },
        confidence=confidence,
        documents=len(first.fidelity.documents),
        tokens=int(first.fidelity.tokens_d.sum()),
        bootstrap_samples=first.metrics["bootstrap_samples"],
        failed=tuple(failed),
    )


def _check(a: Candidate, b: Candidate) -> None:
    check_same(a.source, b.source, a.metrics, b.metrics, a.fidelity, b.fidelity)
    for name in _SETTINGS:
        if a.metrics[name] != b.metrics[name]:
            raise UserError(
                f"{a.source} was evaluated with {name}={a.metrics[name]}, {b.source} with "
                f"{b.metrics[name]}: they must be equal"
            )


def _estimates(candidates: Sequence[Candidate]) -> dict[str, dict[str, Estimate]]:
    """All models on the same draws of documents."""
    first = candidates[0]
    sums = {TEACHER: first.fidelity.sums[TEACHER]}
    for candidate in candidates:
        sums[_after(candidate)] = candidate.fidelity.sums[AFTER]
        sums.setdefault(candidate.origin, candidate.fidelity.sums[BEFORE])
    together = Fidelity(first.fidelity.documents, first.fidelity.tokens_d, sums)
    return estimates(together, first.metrics["bootstrap_samples"], first.metrics["seed"])


def _row(
    candidate: Candidate,
    place: int,
    best: Candidate,
    found: Mapping[str, Mapping[str, Estimate]],
    metric: str,
) -> Row:
    own, confidence = found[_after(candidate)], candidate.metrics["confidence"]
    difference = differences(own, found[_after(best)], confidence)
    return Row(
        rank=place,
        number=candidate.number,
        name=candidate.name,
        changes=dict(candidate.changes),
        figures=_intervals(own, confidence),
        difference=difference,
        verdict="best" if candidate is best else verdict(metric, difference[metric]),
        parameters=_size(candidate),
        tokens_per_second=candidate.tokens_per_second,
        digests=dict(candidate.digests),
    )


def _intervals(figures: Mapping[str, Estimate], confidence: float) -> dict[str, dict[str, float]]:
    return {name: asdict(figures[name].interval(confidence)) for name in SHOWN}


def _references(candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """Name and key of the teacher, and of each student as it was before training."""
    origins = {candidate.origin: candidate for candidate in candidates}
    names = [("Teacher", TEACHER)]
    for origin, one in origins.items():
        made = {f: value for f, value in one.changes.items() if f.startswith("student.")}
        name = f"Before training, {describe(made)}" if len(origins) > 1 else "Before training"
        names.append((name, origin))
    return names


def _after(candidate: Candidate) -> str:
    return f"{AFTER} {candidate.number}"


def _size(candidate: Candidate) -> int:
    return int(candidate.metrics["parameters"][AFTER])
