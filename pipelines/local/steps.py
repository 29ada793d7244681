"""Follows the steps of a local run: tells people and MLflow, and notes who made what."""

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from kfp.dsl.base_component import BaseComponent

from flagscale.artifacts import write_json
from flagscale.execution.notes import FOLDER_VARIABLE, read_error
from flagscale.run_values.literal import literal
from pipelines.local.stopping import Stopped, Stopper
from pipelines.outcome import WITHOUT_A_WORD, StepFailed, StepGone, duration

logger = logging.getLogger(__name__)

_NOTE = "step.json"  # beside a step's outputs: who made them, for runs that reuse them
_PASSES_ON = "pick-candidate"  # what it points to is another step's, and linked as that step's


@dataclass(frozen=True)
class StepResult:
    """What became of a step.

    Attributes:
        seconds: wall time of the work, by the earlier run where it was reused.
        reused: whether the cache had the outputs.
        outputs: the artifacts' paths.
        variant: of a sweep, that the step worked for; empty where all share it.
    """

    seconds: float
    reused: bool
    outputs: Mapping[str, Path]
    variant: str = ""


@dataclass
class RunResult:
    """What a run that ended well leaves.

    Attributes:
        folder: of the run.
        tracking_uri: where MLflow has it.
        tracking_page: of its experiment there, below the server's address.
        seconds: wall time of everything.
        steps: in the order in which they ran; those of a sweep's second variant as `evaluate-2`.
    """

    folder: Path
    tracking_uri: str
    tracking_page: str = ""
    seconds: float = 0.0
    steps: dict[str, StepResult] = field(default_factory=dict)


class Plan:
    """The steps that a pipeline has here, where a loop's items are taken one after another.

    A step that is there several times, in loops or in a search's rungs, is numbered as it runs.

    Attributes:
        total: number of steps.
    """

    def __init__(self, pipeline: BaseComponent, arguments: Mapping[str, Any]) -> None:
        """Read it from the pipeline.

        Args:
            pipeline: its loops, if any, go over a parameter of the pipeline or fixed items.
            arguments: it will be run with these.
        """
        self._turns: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()
        spec = pipeline.pipeline_spec
        for task in spec.root.dag.tasks.values():
            component = task.component_ref.name
            body = spec.components[component].dag.tasks
            if not body:
                self._add(component, [""])
                continue
            labels = self._labels(pipeline, task, arguments)
            for inner in body.values():
                self._add(inner.component_ref.name, labels)
        self.total = sum(self._counts.values())
        self._ended: Counter[str] = Counter()

    def turn(self, name: str) -> tuple[str, str]:
        """What the step that runs now is called in this run, and whose it is; empty: of all.

        Args:
            name: of the step, as KFP numbers those of one kind: `distil-student-2`.
        """
        step = step_of(name)
        if self._counts[step] == 1 and step not in self._looped:
            return step, ""
        labels, ended = self._turns[name], self._ended[name]
        number = 1 + sum(n for other, n in self._ended.items() if step_of(other) == step)
        return f"{step}-{number}", labels[ended] if ended < len(labels) else ""

    def ended(self, name: str) -> None:
        """The step has ended: the next of its name is the next one."""
        self._ended[name] += 1

    @property
    def _looped(self) -> set[str]:
        return {step_of(name) for name, labels in self._turns.items() if labels != [""]}

    def _add(self, component: str, labels: list[str]) -> None:
        name = component.removeprefix("comp-")
        self._turns[name] = labels
        self._counts[step_of(name)] += len(labels)

    def _labels(
        self,
        pipeline: BaseComponent,
        task: Any,  # noqa: ANN401 - KFP's
        arguments: Mapping[str, Any],
    ) -> list[str]:
        """What the items of a loop are called."""
        items = task.parameter_iterator.items
        if items.raw:
            return [f"{task.task_info.name}, {_text(item)}" for item in json.loads(items.raw)]
        parameter = items.input_parameter.removeprefix("pipelinechannel--")
        names = _names(arguments.get(parameter, _default(pipeline, parameter)))
        title = task.task_info.name  # KFP's own, where the loop has none
        return [f"{title}, {name}" if title.startswith("rung ") else name for name in names]


def step_of(name: str) -> str:
    """The step's own name, which KFP numbers from the second task of a kind on."""
    return re.sub(r"-\d+$", "", name)


def _text(item: Any) -> str:  # noqa: ANN401 - any JSON value
    return " ".join(f"{key} {value}" for key, value in item.items())


def _default(pipeline: BaseComponent, parameter: str) -> Any:  # noqa: ANN401 - any JSON value
    inputs = pipeline.pipeline_spec.root.input_definitions.parameters
    return literal(json_format.MessageToDict(inputs[parameter].default_value))


def _names(items: Sequence[Any]) -> list[str]:
    """What a loop's items are called."""
    return [
        str(item["name"]) if isinstance(item, Mapping) and "name" in item else str(number)
        for number, item in enumerate(items, start=1)
    ]


class Steps:
    """Follows the steps of a run: tells people and MLflow, and notes who made what.

    Args:
        result: filled in step by step.
        run: the parent run, a `flagscale.tracking.PipelineRun`.
        stopper: told whether a step is running.
        plan: which steps there will be.
    """

    def __init__(self, result: RunResult, run: Any, stopper: Stopper, plan: Plan) -> None:  # noqa: ANN401
        self._result = result
        self._run = run
        self._stopper = stopper
        self._plan = plan
        self._current = ""
        self._begin = 0.0

    def started(self, name: str) -> None:
        """Give the step a folder for its notes.

        Raises:
            Stopped: a signal has come.
            StepFailed: an earlier step has failed, which KFP's loops would go on after.
        """
        self._check()
        key, _ = self._plan.turn(name)
        logger.info("%s %s ...", self._position(), self._title(name))
        notes = self._result.folder / "steps" / key
        notes.mkdir(parents=True)
        os.environ[FOLDER_VARIABLE] = str(notes)
        self._current, self._begin = self._title(name), time.monotonic()
        self._stopper.step_folder = notes

    def finished(self, name: str, outputs: Mapping[str, Path], gave_values: bool) -> None:
        """Note beside the outputs who made them."""
        notes, self._stopper.step_folder = self._stopper.step_folder, None
        seconds = time.monotonic() - self._begin
        error = notes and read_error(notes)  # of one of several, which the run goes on without
        done = (
            f"failed after {duration(seconds)}: {error}"
            if error
            else (f"done in {duration(seconds)}")
        )
        logger.info("%s %s %s", self._position(), self._title(name), done)
        note = {
            "step": step_of(name),
            "seconds": seconds,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "mlflow_run_id": self._run.newest_child(step_of(name)),
        }
        for path in list(outputs.values())[:1]:  # KFP keeps a task's outputs in one folder
            write_json(path.parent / _NOTE, note)
        self._add(name, seconds, outputs, reused=False)

    def reused(self, name: str, outputs: Mapping[str, Path]) -> None:
        """Show the step in MLflow as what the earlier run measured; raises as `started`."""
        self._check()
        note = _read_note(outputs)
        made = f", made {note['finished']}" if note else ""
        logger.info("%s %s reused from cache%s", self._position(), self._title(name), made)
        if outputs:  # a step without any, like a check, is not tracked
            self._run.reuse(step_of(name), note.get("mlflow_run_id"), read_scalars(outputs))
        _show_students(outputs)
        self._add(name, note.get("seconds", 0.0), outputs, reused=True)

    def failure(self, error: RuntimeError, exceptions: Sequence[str]) -> BaseException:
        """The error to raise after KFP has said that a step failed.

        Args:
            error: KFP's, which does not say why.
            exceptions: what KFP has met in loops' tasks, and does not raise.
        """
        notes, self._stopper.step_folder = self._stopper.step_folder, None
        if self._stopper.signal is not None:
            return Stopped(self._stopper.signal, self._current)
        told = "; ".join(dict.fromkeys(exceptions))
        if notes is None:  # whoever ended last has ended well
            return StepFailed(f"the run ended after {self._current or 'no step'}: {told or error}")
        if isinstance(error, StepGone):
            told = ""  # it follows from that
        message = read_error(notes) or told or WITHOUT_A_WORD
        return StepFailed(f"{self._current} failed: {message}")

    def _check(self) -> None:
        self._stopper.check()
        if self._stopper.step_folder is not None:  # of a step that has not ended well
            raise StepFailed(f"{self._current} failed")

    def _title(self, name: str) -> str:
        variant = self._plan.turn(name)[1]
        return f"{step_of(name)} ({variant})" if variant else step_of(name)

    def _add(self, name: str, seconds: float, outputs: Mapping[str, Path], reused: bool) -> None:
        key, variant = self._plan.turn(name)
        self._plan.ended(name)
        self._result.steps[key] = StepResult(seconds, reused, outputs, variant)
        for output, path in outputs.items() if step_of(name) != _PASSES_ON else ():
            # `distilled_student-2` is of a sweep's second variant.
            (self._result.folder / f"{output}{key.removeprefix(step_of(name))}").symlink_to(path)

    def _position(self) -> str:
        return f"[{len(self._result.steps) + 1}/{self._plan.total}]"


def _show_students(outputs: Mapping[str, Path]) -> None:
    """Give this run's parent in MLflow the children that the step which was reused gave its."""
    from flagscale.evaluation import LEADERBOARD, SEARCH
    from flagscale.tracking.candidates import log_candidates
    from flagscale.tracking.variants import log_variants

    for output, file, log in (
        ("leaderboard", LEADERBOARD, log_variants),
        ("search", SEARCH, log_candidates),
    ):
        if output in outputs:
            log(json.loads((outputs[output] / file).read_text(encoding="utf-8")))


def _read_note(outputs: Mapping[str, Path]) -> dict[str, Any]:
    for path in list(outputs.values())[:1]:
        note = path.parent / _NOTE
        if note.exists():
            return json.loads(note.read_text(encoding="utf-8"))
    return {}


def read_summary(outputs: Mapping[str, Path]) -> str:
    """The Markdown that a step sums its result up with; empty where it does not."""
    from flagscale.evaluation import SUMMARY

    found = [path / SUMMARY for path in outputs.values() if (path / SUMMARY).is_file()]
    return found[0].read_text(encoding="utf-8") if found else ""


def read_scalars(outputs: Mapping[str, Path]) -> dict[str, float]:
    """The figures in a step's output of metrics, whose name ends so."""
    from flagscale.execution.metrics_file import read_metrics

    found: dict[str, float] = {}
    for output, path in outputs.items():
        if output.endswith("_metrics") and path.is_file():
            found |= read_metrics(path, "").figures
    return found
