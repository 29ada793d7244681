"""What models scored on lm-eval's tasks, example by example: the `task-evaluation` artifact.

Values are kept for every example, so that two models are compared paired: by the examples that one
of them gets right and the other wrong, and not by two averages with an interval each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.artifacts import open_artifact, write_json
from flagscale.errors import UserError

KIND = "task-evaluation"
TASKS, PER_EXAMPLE = "tasks.json", "per_example.jsonl"


@dataclass(frozen=True)
class TaskScores:
    """One metric of one task.

    Attributes:
        task: lm-eval's name of it.
        metric: lm-eval's name, and after a comma the filter where it is not `none`.
        higher_is_better: whether more of it is better.
        examples: a hash of each document that was asked about, in the task's order.
        values: model -> the metric of each example, float64 [examples]; their mean is the model's
            figure. Empty for a metric that is no mean over examples (perplexity, corpus BLEU).
        reported: model -> the value and its standard error as lm-eval gives them; None where it
            gives none.
    """

    task: str
    metric: str
    higher_is_better: bool
    examples: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    reported: Mapping[str, tuple[float, float | None]]


def figure_names(scores: Sequence[TaskScores]) -> tuple[str, ...]:
    """The name of each as a figure of a model: `<task>` of a task's first metric.

    The others are `<task>:<metric>`.
    """
    seen: set[str] = set()
    names = []
    for score in scores:
        names.append(f"{score.task}:{score.metric}" if score.task in seen else score.task)
        seen.add(score.task)
    return tuple(names)


def save_scores(folder: Path, scores: Sequence[TaskScores]) -> None:
    """Write the files that `load_scores` reads, into an artifact that is being written.

    `tasks.json` has one entry a metric, without its values; `per_example.jsonl` has one line for
    each example of a task: `{"task", "example", "values": {metric: {model: value}}}`.
    """
    write_json(
        folder / TASKS,
        [
            {
                "task": score.task,
                "metric": score.metric,
                "higher_is_better": score.higher_is_better,
                "examples": len(score.examples),
                "models": list(score.values),
                "reported": {model: list(pair) for model, pair in score.reported.items()},
            }
            for score in scores
        ],
    )
    with (folder / PER_EXAMPLE).open("w", encoding="utf-8") as stream:
        for line in _lines(scores):
            stream.write(json.dumps(line) + "\n")


def _lines(scores: Sequence[TaskScores]) -> Iterator[dict[str, Any]]:
    by_task: dict[str, list[TaskScores]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(score)
    for task, metrics in by_task.items():
        for index, example in enumerate(metrics[0].examples):
            values = {
                score.metric: {
                    model: float(values_e[index]) for model, values_e in score.values.items()
                }
                for score in metrics
                if score.values
            }
            yield {"task": task, "example": example, "values": values}


def load_scores(folder: Path) -> tuple[TaskScores, ...]:
    """Read a `task-evaluation` artifact.

    Args:
        folder: of the artifact.

    Returns:
        One for each metric, in lm-eval's order, the metrics of a task one after the other.

    Raises:
        UserError: it is none, or its files do not belong together.
    """
    open_artifact(folder, KIND)
    return read_scores(folder)


def read_scores(folder: Path) -> tuple[TaskScores, ...]:
    """`load_scores` of a folder that has an artifact's `tasks.json` and `per_example.jsonl` alone.

    Raises:
        UserError: they do not belong together.
    """
    try:
        tasks = json.loads((folder / TASKS).read_text(encoding="utf-8"))
        with (folder / PER_EXAMPLE).open(encoding="utf-8") as stream:
            lines = [json.loads(line) for line in stream]
        by_task: dict[str, list[dict[str, Any]]] = {entry["task"]: [] for entry in tasks}
        for line in lines:
            by_task[line["task"]].append(line)
        return tuple(_read(entry, by_task[entry["task"]]) for entry in tasks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not the scores of tasks ({error!r}); make it anew") from error


def _read(entry: dict[str, Any], lines: list[dict[str, Any]]) -> TaskScores:
    if len(lines) != entry["examples"]:
        raise ValueError(f"{entry['task']}: {len(lines)} examples, not {entry['examples']}")
    metric = entry["metric"]
    return TaskScores(
        task=entry["task"],
        metric=metric,
        higher_is_better=entry["higher_is_better"],
        examples=tuple(line["example"] for line in lines),
        values={
            model: np.array([line["values"][metric][model] for line in lines], dtype=np.float64)
            for model in entry["models"]
        },
        reported={
            model: (float(value), None if stderr is None else float(stderr))
            for model, (value, stderr) in entry["reported"].items()
        },
    )
