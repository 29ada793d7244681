"""An audit as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flagscale.evaluation.pages.template import template

AUDIT = "audit.html"


def render(findings: Sequence[Mapping[str, Any]], student: str) -> str:
    """The page as HTML. The same findings give the same bytes.

    Args:
        findings: as `Finding.values` gives them, and as the student's manifest holds them.
        student: what was audited, in a few words.
    """
    rows = [
        {
            **finding,
            "key": finding["verdict"].replace(" ", "-"),
            "figure": _number(finding["figure"]),
            "tolerance": _number(finding["tolerance"]),
        }
        for finding in findings
    ]
    return template("pages/audit.html.j2").render(
        headline=headline(findings), subtitle=student, rows=rows
    )


def headline(findings: Sequence[Mapping[str, Any]]) -> str:
    """The outcome in one sentence, which counts what was not run too."""
    counts = {
        verdict: sum(finding["verdict"] == verdict for finding in findings)
        for verdict in ("passed", "failed", "warning", "not run")
    }
    said = f"{counts['passed']} of {len(findings)} checks passed"
    if counts["failed"]:
        said = f"{counts['failed']} of {len(findings)} checks failed"
    rest = [
        f"{counts[verdict]} {word}"
        for verdict, word in (("warning", "with a warning"), ("not run", "not run"))
        if counts[verdict]
    ]
    return ", ".join([said, *rest])


def _number(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"
