"""Follows the steps of a local run: tells people and MLflow, and notes who made what."""

import json
import logging
import os
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
from pipelines.outcome import StepFailed, duration

logger = logging.getLogger(__name__)

_NOTE = "step.json"  # beside a step's outputs: who made them, for runs that reuse them


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
        seconds: wall time of everything.
        steps: in the order in which they ran; those of a sweep's second variant as `evaluate-2`.
    """

    folder: Path
    tracking_uri: str
    seconds: float = 0.0
    steps: dict[str, StepResult] = field(default_factory=dict)


class Plan:
    """The steps that a pipeline has here, where a loop's variants run one after another.

    Attributes:
        total: number of steps.
    """

    def __init__(self, pipeline: BaseComponent, arguments: Mapping[str, Any]) -> None:
        """Read it from the pipeline.

        Args:
            pipeline: its loops, if any, go over a parameter of the pipeline.
            arguments: it will be run with these.
        """
        self.total = 0
        self._variants: dict[str, list[str]] = {}
        spec = pipeline.pipeline_spec
        for task in spec.root.dag.tasks.values():
            body = spec.components[task.component_ref.name].dag.tasks
            if not body:
                self.total += 1
                continue
            parameter = task.parameter_iterator.items.input_parameter
            parameter = parameter.removeprefix("pipelinechannel--")
            variants = _names(arguments.get(parameter, _default(pipeline, parameter)))
            self.total += len(body) * len(variants)
            self._variants |= dict.fromkeys(body, variants)

    def turn(self, name: str, before: int) -> tuple[str, str]:
        """What the step is called in this run, and its variant; empty for a step of no loop.

        Args:
            name: of the step.
            before: how often it has run.
        """
        variants = self._variants.get(name)
        if variants is None:
            return name, ""
        return f"{name}-{before + 1}", variants[before]


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
        self._ended: Counter[str] = Counter()
        self._current = ""
        self._begin = 0.0

    def started(self, name: str) -> None:
        """Give the step a folder for its notes.

        Raises:
            Stopped: a signal has come.
            StepFailed: an earlier step has failed, which KFP's loops would go on after.
        """
        self._check()
        key, _ = self._turn(name)
        logger.info("%s %s ...", self._position(), self._title(name))
        notes = self._result.folder / "steps" / key
        notes.mkdir(parents=True)
        os.environ[FOLDER_VARIABLE] = str(notes)
        self._current, self._begin = self._title(name), time.monotonic()
        self._stopper.step_folder = notes

    def finished(self, name: str, outputs: Mapping[str, Path], gave_values: bool) -> None:
        """Note beside the outputs who made them."""
        self._stopper.step_folder = None
        seconds = time.monotonic() - self._begin
        logger.info("%s %s done in %s", self._position(), self._title(name), duration(seconds))
        note = {
            "step": name,
            "seconds": seconds,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "mlflow_run_id": self._run.newest_child(name),
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
            self._run.reuse(name, note.get("mlflow_run_id"), read_scalars(outputs))
        if name == "leaderboard":
            _show_variants(outputs["leaderboard"])
        self._add(name, note.get("seconds", 0.0), outputs, reused=True)

    def failure(self) -> BaseException:
        """The error to raise after KFP has said that a step failed."""
        notes, self._stopper.step_folder = self._stopper.step_folder, None
        if self._stopper.signal is not None:
            return Stopped(self._stopper.signal, self._current)
        message = notes and read_error(notes)
        return StepFailed(
            f"{self._current} failed: "
            + (message or "it ended without a word: killed, perhaps for want of memory")
        )

    def _check(self) -> None:
        self._stopper.check()
        if self._stopper.step_folder is not None:  # of a step that has not ended well
            raise StepFailed(f"{self._current} failed")

    def _turn(self, name: str) -> tuple[str, str]:
        return self._plan.turn(name, self._ended[name])

    def _title(self, name: str) -> str:
        variant = self._turn(name)[1]
        return f"{name} ({variant})" if variant else name

    def _add(self, name: str, seconds: float, outputs: Mapping[str, Path], reused: bool) -> None:
        key, variant = self._turn(name)
        self._ended[name] += 1
        self._result.steps[key] = StepResult(seconds, reused, outputs, variant)
        for output, path in outputs.items():
            # `distilled_student-2` is of a sweep's second variant.
            (self._result.folder / f"{output}{key.removeprefix(name)}").symlink_to(path)

    def _position(self) -> str:
        return f"[{len(self._result.steps) + 1}/{self._plan.total}]"


def _show_variants(table: Path) -> None:
    """Give this run's parent in MLflow the variants that the leaderboard's own step gave its."""
    from flagscale.evaluation import LEADERBOARD
    from flagscale.tracking.variants import log_variants

    log_variants(json.loads((table / LEADERBOARD).read_text(encoding="utf-8")))


def _read_note(outputs: Mapping[str, Path]) -> dict[str, Any]:
    for path in list(outputs.values())[:1]:
        note = path.parent / _NOTE
        if note.exists():
            return json.loads(note.read_text(encoding="utf-8"))
    return {}


def read_scalars(outputs: Mapping[str, Path]) -> dict[str, float]:
    """The figures in a step's output of metrics, whose name ends so."""
    from flagscale.execution.metrics_file import read_metrics

    found: dict[str, float] = {}
    for output, path in outputs.items():
        if output.endswith("_metrics") and path.is_file():
            found |= read_metrics(path, "").figures
    return found
