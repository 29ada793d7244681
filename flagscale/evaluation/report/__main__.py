"""Renders a report again, with scores on tasks and beside other runs of the same documents.

python -m flagscale.evaluation.report EVALUATION --tasks TASK_EVALUATION \
        --beside baseline=ANOTHER_EVALUATION --output report.html
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.evaluation.generation.speed import Speed
from flagscale.evaluation.report.data import ReportData
from flagscale.evaluation.report.other_runs import named_folders, with_others
from flagscale.evaluation.report.page import render
from flagscale.evaluation.report.verdict import verdict
from flagscale.evaluation.tasks.scores import KIND, load_scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flagscale.evaluation.report",
        description="Render an evaluation's report again, with tasks and beside other runs.",
    )
    parser.add_argument("evaluation", type=Path, help="evaluation folder")
    parser.add_argument("--tasks", type=Path, help="task-evaluation folder of the same student")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="evaluation folder of another run, by the name it gets; may be given again",
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page")
    options = parser.parse_args(arguments)
    try:
        data = ReportData.load(options.evaluation)
        data = with_others(data, options.evaluation, named_folders(options.beside))
        tasks = load_scores(options.tasks) if options.tasks else ()
        if options.tasks:
            told = open_artifact(options.tasks, KIND).facts["generation"]
            speeds = {model: [Speed(**one) for one in engines] for model, engines in told.items()}
            data = replace(data, generation=speeds)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    options.output.write_text(render(data, tasks), encoding="utf-8")
    sys.stdout.write(f"{verdict(data, tasks)}\n{options.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
