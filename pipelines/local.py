"""Runs the pipeline on this machine: checks first, one line a step, the step's own error last.

What a run leaves behind, in one folder (`runs/`):

    latest -> <time>-<recipe>/   this run: recipe.yaml, run.log, summary.json, and a link to each
                                 step's outputs (`evaluate-report`, `export-student-model`, ...)
    artifacts/                   what the steps wrote; runs share what the cache reuses
    cache/                       which inputs gave which outputs
    checkpoints/                 of trainings that have not ended
    mlflow.db, mlartifacts/      tracking, unless MLFLOW_TRACKING_URI names a server
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kfp.dsl.base_component import BaseComponent

from flagscale.artifacts import digest, write_json
from flagscale.processes import FOLDER_VARIABLE, RUNNER_VARIABLE, read_error, this_process
from flagscale.recipe import Recipe
from flagscale.recipe.training import CHANGES_NO_RESULT
from pipelines.containers import Containers
from pipelines.distillation import build_pipeline, source_version
from pipelines.output import quiet_kfp
from pipelines.preflight import SourceCheck, with_fingerprints
from pipelines.step_cache import kfp_local
from pipelines.stopping import Stopped, Stopper

logger = logging.getLogger(__name__)

_NOTE = "step.json"  # beside a step's outputs: who made them, for runs that reuse them
_CHECKPOINTED = ("data", "teacher", "student", "distillation", "training")


class StepFailed(Exception):  # noqa: N818 - it reports what happened to a step
    """A step ended with an error; the message is the step's own, after its name."""


@dataclass(frozen=True)
class StepResult:
    """What became of a step.

    Attributes:
        seconds: wall time of the work, by the earlier run where it was reused.
        reused: whether the cache had the outputs.
        outputs: the artifacts' paths.
    """

    seconds: float
    reused: bool
    outputs: Mapping[str, Path]


@dataclass
class RunResult:
    """What a run that ended well leaves.

    Attributes:
        folder: of the run.
        tracking_uri: where MLflow has it.
        seconds: wall time of everything.
        steps: in the order in which they ran.
    """

    folder: Path
    tracking_uri: str
    seconds: float = 0.0
    steps: dict[str, StepResult] = field(default_factory=dict)


def run_recipe(
    recipe: Recipe, runs: Path, reuse: bool = True, image: str | None = None
) -> RunResult:
    """Check the recipe against the world, then run the distillation pipeline for it.

    Args:
        recipe: validated.
        runs: folder of all runs.
        reuse: False to repeat every step, the training from its beginning.
        image: None for steps that are processes; else each runs in a container of this image.

    Raises:
        UserError: the teacher, the text, the tracking server or the image does not serve, or the
            student is deeper than the teacher: before any work.
        StepFailed: a step failed.
        Stopped: a signal came, and the running step has ended.
    """
    from flagscale import tracking

    recipe = with_fingerprints(recipe)
    runs.mkdir(parents=True, exist_ok=True)
    code = source_version()
    containers = None
    if image is not None:
        containers = Containers(image, code, recipe, runs)
        code += f" in {containers.identity}"  # another image may hold other libraries
    sources = SourceCheck(recipe)
    try:
        tracking.connect(recipe, runs)
        sources.wait()
    except BaseException:
        sources.cancel()
        raise
    checkpoints = checkpoint_folder(recipe, runs)
    if not reuse:
        shutil.rmtree(checkpoints, ignore_errors=True)
    pipeline = build_pipeline(recipe, code_version=code)
    # The runner names the experiment; as an argument it would be part of every cache key.
    arguments = {"checkpoints": str(checkpoints), "experiment": ""}
    result = run_pipeline(pipeline, arguments, recipe, runs, reuse, containers)
    shutil.rmtree(checkpoints, ignore_errors=True)  # they serve trainings that have not ended
    return result


def checkpoint_folder(recipe: Recipe, runs: Path) -> Path:
    """Where this training keeps its checkpoints: the same for an equal training, run again."""
    sections = recipe.model_dump(
        mode="json", include=set(_CHECKPOINTED), exclude={"training": set(CHANGES_NO_RESULT)}
    )
    return runs.absolute() / "checkpoints" / f"{recipe.name}-{digest(sections)[7:19]}"


def run_pipeline(
    pipeline: BaseComponent,
    arguments: dict[str, Any],
    recipe: Recipe,
    runs: Path,
    reuse: bool,
    containers: Containers | None = None,
) -> RunResult:
    """Run any pipeline whose steps use `step_process`, tracked and stoppable.

    Args:
        pipeline: its steps run on this machine, one after the other.
        arguments: of the pipeline.
        recipe: names the run and its experiment, and is logged.
        runs: folder of all runs.
        reuse: False to repeat every step.
        containers: where the steps run; None: as processes.

    Raises:
        UserError: the tracking server is not usable.
        StepFailed: a step failed.
        Stopped: a signal came, and the running step has ended.
    """
    from flagscale import tracking

    runs = runs.absolute()
    begin = time.monotonic()
    folder = _run_folder(runs, recipe.name)
    (folder / "recipe.yaml").write_text(tracking.recipe_yaml(recipe), encoding="utf-8")
    stopper = Stopper()
    with (
        quiet_kfp(folder / "run.log"),
        stopper.handling(),
        tracking.pipeline_run(recipe, runs) as run,
    ):
        result = RunResult(folder, run.uri)
        total = len(pipeline.pipeline_spec.root.dag.tasks)
        steps = Steps(result, run, stopper, total)
        environment = {**run.environment, RUNNER_VARIABLE: this_process(), "PYTHONUNBUFFERED": "1"}
        watch = containers.watch(pipeline, steps, stopper) if containers else nullcontext(steps)
        with (
            _environment(environment),
            watch as observer,
            kfp_local(
                runs / "artifacts",
                runs / "cache",
                observer,
                reuse,
                containers and containers.runner,
            ),
        ):
            try:
                pipeline(**arguments)
                if containers:
                    containers.check()
            except RuntimeError as error:  # KFP's, which does not say why
                raise steps.failure() from error
        result.seconds = time.monotonic() - begin
        run.log_metrics({f"seconds/{name}": step.seconds for name, step in result.steps.items()})
        evaluation = result.steps.get("evaluate")
        if evaluation:  # so that runs compare without opening their children
            run.log_metrics(_scalars(evaluation.outputs.get("metrics")))
    return result


class Steps:
    """Follows the steps of a run: tells people and MLflow, and notes who made what.

    Args:
        result: filled in step by step.
        run: the parent run, a `flagscale.tracking.PipelineRun`.
        stopper: told whether a step is running.
        total: number of steps.
    """

    def __init__(self, result: RunResult, run: Any, stopper: Stopper, total: int) -> None:  # noqa: ANN401
        self._result = result
        self._run = run
        self._stopper = stopper
        self._total = total
        self._current = ""
        self._begin = 0.0

    def started(self, name: str) -> None:
        """Give the step a folder for its notes; raises `Stopped` when a signal has come."""
        self._stopper.check()
        logger.info("%s %s ...", self._position(), name)
        notes = self._result.folder / "steps" / name
        notes.mkdir(parents=True)
        os.environ[FOLDER_VARIABLE] = str(notes)
        self._current, self._begin = name, time.monotonic()
        self._stopper.step_folder = notes

    def finished(self, name: str, outputs: Mapping[str, Path]) -> None:
        """Note beside the outputs who made them."""
        self._stopper.step_folder = None
        seconds = time.monotonic() - self._begin
        logger.info("%s %s done in %s", self._position(), name, duration(seconds))
        note = {
            "step": name,
            "seconds": seconds,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "mlflow_run_id": self._run.newest_child(name),
        }
        for path in list(outputs.values())[:1]:  # KFP keeps a task's outputs in one folder
            write_json(path.parent / _NOTE, note)
        self._add(name, StepResult(seconds, reused=False, outputs=outputs))

    def reused(self, name: str, outputs: Mapping[str, Path]) -> None:
        """Show the step in MLflow as what the earlier run measured."""
        self._stopper.check()
        note = _read_note(outputs)
        made = f", made {note['finished']}" if note else ""
        logger.info("%s %s reused from cache%s", self._position(), name, made)
        self._run.reuse(name, note.get("mlflow_run_id"), _scalars(outputs.get("metrics")))
        self._add(name, StepResult(note.get("seconds", 0.0), reused=True, outputs=outputs))

    def failure(self) -> Exception:
        """The error to raise after KFP has said that a step failed."""
        notes, self._stopper.step_folder = self._stopper.step_folder, None
        if self._stopper.signal is not None:
            return Stopped(self._stopper.signal, self._current)
        message = notes and read_error(notes)
        return StepFailed(
            f"{self._current} failed: "
            + (message or "it ended without a word: killed, perhaps for want of memory")
        )

    def _add(self, name: str, step: StepResult) -> None:
        self._result.steps[name] = step
        for output, path in step.outputs.items():
            (self._result.folder / f"{name}-{output}").symlink_to(path)

    def _position(self) -> str:
        return f"[{len(self._result.steps) + 1}/{self._total}]"


def duration(seconds: float) -> str:
    """`12 s` or `3 min 20 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def _run_folder(runs: Path, name: str) -> Path:
    """A new folder for a run, which `latest` then points to."""
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H-%M-%S")
    folder = runs / f"{stamp}-{name}"
    number = 1
    while folder.exists():
        number += 1
        folder = runs / f"{stamp}-{name}-{number}"
    folder.mkdir(parents=True)
    link = runs / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, runs / "latest")
    return folder


def _read_note(outputs: Mapping[str, Path]) -> dict[str, Any]:
    for path in list(outputs.values())[:1]:
        note = path.parent / _NOTE
        if note.exists():
            return json.loads(note.read_text(encoding="utf-8"))
    return {}


def _scalars(metrics: Path | None) -> dict[str, float]:
    if metrics is None or not metrics.is_file():
        return {}
    values = json.loads(metrics.read_text(encoding="utf-8"))
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that the steps' processes inherit."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
