"""Compare two evaluations of the same teacher on the same documents.

    python -m flagscale.evaluation.compare EVALUATION_A EVALUATION_B --names distilled baseline

prints a Markdown table of both runs' distilled students with confidence intervals, and the
differences A - B. The documents are resampled for both at once, so that the differences are
paired: their intervals are narrower than the single ones suggest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.evaluation import METRICS, PER_DOCUMENT
from flagscale.evaluation.bootstrap import Interval
from flagscale.evaluation.fidelity import FIGURES, TEACHER, Fidelity, read_rows
from flagscale.evaluation.figures import AFTER, BEFORE, SHOWN, differences, estimates, verdict


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        models: row -> figure -> value, low, high.
        paired: figure -> value, low, high of A - B.
        names: of A and B.
        confidence: mass of the intervals.
        documents: how many were measured.
        tokens: how many were predicted.
    """

    models: dict[str, dict[str, Interval]]
    paired: dict[str, dict[str, float]]
    names: tuple[str, str]
    confidence: float
    documents: int
    tokens: int

    def markdown(self) -> str:
        """The tables."""
        head = ["", *(figure.label for figure in SHOWN.values())]
        rows = [
            [name, *(_cell(f, asdict(figures[f])) for f in SHOWN)]
            for name, figures in self.models.items()
        ]
        a, b = self.names
        difference = [
            [SHOWN[f].label, _cell(f, self.paired[f], signed=True), verdict(f, self.paired[f])]
            for f in SHOWN
            if f in self.paired
        ]
        note = (
            f"{self.documents} documents, {self.tokens:,} tokens; {100 * self.confidence:g}% "
            "intervals, bootstrapped over documents."
        )
        pairs = _table(["", f"{a} - {b} (paired)", f"{a} is"], difference)
        return f"{_table(head, rows)}\n{pairs}\n{note}\n"


def compare(a: Path, b: Path, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Compare the distilled students of two evaluation artifacts.

    Raises:
        UserError: they are no evaluations, or not of the same documents, windows and teacher.
    """
    if len({*names, "Teacher", "Student before"}) < 4:
        raise UserError(
            f"names {names[0]!r} and {names[1]!r}: must differ from each other, from 'Teacher' and "
            "from 'Student before'"
        )
    metrics_a, fidelity_a = read_evaluation(a)
    metrics_b, fidelity_b = read_evaluation(b)
    check_same(a, b, metrics_a, metrics_b, fidelity_a, fidelity_b)
    sums = {
        "Teacher": fidelity_a.sums[TEACHER],
        "Student before": fidelity_a.sums[BEFORE],
        names[0]: fidelity_a.sums[AFTER],
        names[1]: fidelity_b.sums[AFTER],
    }
    if not is_same_model(fidelity_a.sums[BEFORE], fidelity_b.sums[BEFORE]):
        del sums["Student before"]  # they started from different students
    both = Fidelity(fidelity_a.documents, fidelity_a.tokens_d, sums)
    found = estimates(both, metrics_a["bootstrap_samples"], metrics_a["seed"])
    confidence = metrics_a["confidence"]
    return Comparison(
        models={
            name: {f: figures[f].interval(confidence) for f in SHOWN}
            for name, figures in found.items()
        },
        paired=differences(found[names[0]], found[names[1]], confidence),
        names=names,
        confidence=confidence,
        documents=len(both.documents),
        tokens=int(both.tokens_d.sum()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flagscale.evaluation.compare",
        description="Compare the distilled students of two evaluations, paired by document.",
    )
    parser.add_argument("a", type=Path, help="evaluation folder")
    parser.add_argument("b", type=Path, help="evaluation folder of the same teacher and documents")
    parser.add_argument(
        "--names", nargs=2, default=("A", "B"), metavar=("A", "B"), help="what to call them"
    )
    options = parser.parse_args(arguments)
    try:
        comparison = compare(options.a, options.b, (options.names[0], options.names[1]))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(comparison.markdown())
    return 0


def read_evaluation(folder: Path) -> tuple[dict[str, Any], Fidelity]:
    """The figures of an evaluation artifact, and its sums per document.

    Raises:
        UserError: it is none, or is damaged.
    """
    open_artifact(folder, "evaluation")
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    with (folder / PER_DOCUMENT).open(encoding="utf-8") as lines:
        return metrics, read_rows([json.loads(line) for line in lines])


def check_same(
    a: Path,
    b: Path,
    metrics_a: Mapping[str, Any],
    metrics_b: Mapping[str, Any],
    fidelity_a: Fidelity,
    fidelity_b: Fidelity,
) -> None:
    """Refuse evaluations that cannot be compared.

    Raises:
        UserError: they are not of the same documents, windows and teacher.
    """
    if fidelity_a.documents != fidelity_b.documents:
        shared = len({*fidelity_a.documents} & {*fidelity_b.documents})
        raise UserError(
            f"{a} measured {len(fidelity_a.documents)} documents and {b} "
            f"{len(fidelity_b.documents)}, of which {shared} are the same: evaluate both runs with "
            "the same data section and evaluation.max_documents"
        )
    if metrics_a["seq_length"] != metrics_b["seq_length"]:
        raise UserError(
            f"{a} was measured with data.seq_length={metrics_a['seq_length']}, {b} with "
            f"{metrics_b['seq_length']}: they must be equal"
        )
    if not is_same_model(fidelity_a.sums[TEACHER], fidelity_b.sums[TEACHER]):
        raise UserError(f"{a} and {b} have different teachers: their KLs cannot be compared")


def is_same_model(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether these are figures of one model, measured on perhaps different machines."""
    return all(np.allclose(a[f], b[f], rtol=1e-3, atol=1) for f in FIGURES)


def _cell(figure: str, interval: Mapping[str, float], signed: bool = False) -> str:
    value, low, high = (
        SHOWN[figure].text(interval[key], signed) for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
