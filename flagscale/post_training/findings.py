"""What an audit finds: one line a check, with figure and tolerance, whether it passed or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Verdict = Literal["passed", "warning", "failed", "not run"]
# The worse comes first: where ranks disagree, it is what holds.
_WORST_FIRST: tuple[Verdict, ...] = ("failed", "warning", "passed", "not run")


@dataclass(frozen=True)
class Finding:
    """What came of a check.

    Attributes:
        check: its name.
        figure: what was measured, if it is a number.
        tolerance: the most, or what else the figure is held against.
        verdict: whether it holds.
        note: what the figure is; of a check that failed the cause, of one that was not run why.
    """

    check: str
    figure: float | None
    tolerance: float | None
    verdict: Verdict
    note: str

    def values(self) -> dict[str, Any]:
        """For JSON, which knows no NaN."""
        found = asdict(self)
        if self.figure is not None and not math.isfinite(self.figure):
            found["figure"] = str(self.figure)
        return found


def within(check: str, figure: float, tolerance: float, note: str, cause: str = "") -> Finding:
    """A figure that must be at most `tolerance` in size; NaN is not.

    Args:
        check: its name.
        figure: measured.
        tolerance: at least 0.
        note: what the figure is.
        cause: what it means if it is larger; default: the note.
    """
    holds = abs(figure) <= tolerance
    return Finding(
        check, figure, tolerance, "passed" if holds else "failed", note if holds else cause or note
    )


def fault(check: str, cause: str | None, note: str) -> Finding:
    """A check without a figure: it failed if there is a cause."""
    return Finding(check, None, None, "failed" if cause else "passed", cause or note)


def not_run(check: str, why: str) -> Finding:
    """A check that did not take place here."""
    return Finding(check, None, None, "not run", why)


def of_all_ranks(findings: Sequence[Finding]) -> list[Finding]:
    """Each check once, as the rank with the worst outcome has it. All ranks call it.

    The order is that of the first rank that has a check.
    """
    told: list[Sequence[Finding]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, list(findings))
    found: dict[str, Finding] = {}
    for finding in (one for rank in told for one in rank):
        before = found.get(finding.check)
        if before is None or _rank(finding) < _rank(before):
            found[finding.check] = finding
    return list(found.values())


def failures(findings: Sequence[Finding]) -> list[str]:
    """A line for each check that failed."""
    return [f"{one.check}: {one.note}" for one in findings if one.verdict == "failed"]


def as_text(findings: Sequence[Finding]) -> str:
    """A table for the log, and how many of each verdict there are."""
    rows = [("check", "figure", "tolerance", "", "")]
    rows += [
        (one.check, number(one.figure), number(one.tolerance), one.verdict, one.note)
        for one in findings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                row[1].rjust(widths[1]),
                row[2].rjust(widths[2]),
                row[3].ljust(widths[3]),
                row[4],
            ]
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, counted(findings)])


def counted(findings: Sequence[Finding]) -> str:
    """`17 passed, 1 not run`."""
    verdicts: list[Verdict] = ["passed", "warning", "failed", "not run"]
    counts = {verdict: sum(one.verdict == verdict for one in findings) for verdict in verdicts}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def number(value: float | None) -> str:
    """Three digits; a dash where there is none."""
    return "-" if value is None else f"{value:.3g}"


def _rank(finding: Finding) -> int:
    return _WORST_FIRST.index(finding.verdict)
