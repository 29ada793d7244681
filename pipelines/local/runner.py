"""Runs the pipeline on this machine: checks first, one line a step, the step's own error last.

What a run leaves behind, in one folder (`runs/`):

    latest -> <time>-<recipe>/   this run: recipe.yaml, run.log, summary.json, and a link to each
                                 of what the steps wrote (`report`, `exported_student`, ...)
    artifacts/                   what the steps wrote; runs share what the cache reuses
    cache/                       which inputs gave which outputs
    checkpoints/                 of trainings that have not ended
    mlflow.db, mlartifacts/      tracking, unless MLFLOW_TRACKING_URI names a server
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from kfp.dsl.base_component import BaseComponent

from flagscale.artifacts import digest
from flagscale.errors import UserError
from flagscale.processes import RUNNER_VARIABLE, this_process
from flagscale.recipe import Recipe
from flagscale.recipe.decisive import decisive
from flagscale.run_values.literal import carried
from pipelines.distillation import build_pipeline, build_preparation, source_version
from pipelines.local.containers import Containers
from pipelines.local.output import quiet_kfp
from pipelines.local.preflight import SourceCheck, with_fingerprints
from pipelines.local.recipe_files import LATEST, before_this_run
from pipelines.local.step_cache import kfp_local
from pipelines.local.steps import Plan, RunResult, Steps, read_scalars, read_summary
from pipelines.local.stopping import Stopper

logger = logging.getLogger(__name__)

_CHECKPOINTED = ("data", "teacher", "student", "distillation", "training")


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
        UserError: the teacher, the text, the folder of runs, the tracking server or the image does
            not serve, the student is deeper than the teacher, or another run trains what is to be
            trained from its beginning: before any work.
        StepFailed: a step failed.
        Stopped: a signal came, and the running step has ended.
    """
    if image is not None:  # it gets no GPU
        try:
            recipe.check_on_cpu()
        except ValueError as error:
            raise UserError(f"--image {image}: {error}") from error
    runs = _writable(runs)
    recipe = with_fingerprints(before_this_run(recipe, runs))
    code = source_version()
    containers = None
    if image is not None:
        containers = Containers(image, code, recipe, runs)
        code += f" in {containers.identity}"  # another image may hold other libraries
    _check(recipe, runs)
    checkpoints = checkpoint_folder(recipe, runs)
    if not reuse and (held := _forget(checkpoints)):
        raise UserError(f"--no-cache: {held[0]}: another run trains there; stop it, or wait for it")
    pipeline = build_pipeline(recipe, code_version=code)
    # The runner names the experiment; as an argument it would be part of every cache key.
    arguments = {"training_checkpoints": str(checkpoints), "tracking_experiment": ""}
    result = run_pipeline(pipeline, arguments, recipe, runs, reuse, containers)
    for folder in _forget(checkpoints):  # they serve trainings that have not ended
        logger.warning("%s: another run trains there, and goes on", folder)
    return result


def prepare_recipe(recipe: Recipe, runs: Path) -> RunResult:
    """Check the recipe against the world, then make what training starts from, or reuse it.

    Args:
        recipe: validated, without a sweep.
        runs: folder of all runs.

    Raises:
        UserError: see `run_recipe`.
        StepFailed: see there.
        Stopped: see there.
    """
    runs = _writable(runs)
    recipe = with_fingerprints(before_this_run(recipe, runs))
    _check(recipe, runs)
    pipeline = build_preparation(recipe, code_version=source_version())
    # What a whole run would be given, so that it finds these steps in the cache.
    checkpoints = checkpoint_folder(recipe, runs)
    arguments = {"training_checkpoints": str(checkpoints), "tracking_experiment": ""}
    return run_pipeline(pipeline, arguments, recipe, runs, reuse=True, is_whole=False)


def _check(recipe: Recipe, runs: Path) -> None:
    """Look at the sources while tracking is set up."""
    from flagscale import tracking

    sources = SourceCheck(recipe)
    try:
        tracking.connect(recipe, runs)
        sources.wait()
    except BaseException:
        sources.cancel()
        raise


def _writable(runs: Path) -> Path:
    """The folder of runs in full, made and tried."""
    runs = _plain(runs)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=runs).close()
    except OSError as error:
        raise UserError(
            f"--runs {runs}: {error.strerror}; name a folder that can be written, or a new one"
        ) from error
    return runs


def checkpoint_folder(recipe: Recipe, runs: Path) -> Path:
    """Where this training keeps its checkpoints: the same for an equal training, run again."""
    sections = recipe.model_dump(mode="json", include=set(_CHECKPOINTED))
    sections = decisive(sections)
    if recipe.sweep is not None:
        sections["vary"] = recipe.sweep.model_dump(mode="json")["vary"]
    if recipe.search is not None:
        sections["candidates"] = recipe.search.model_dump(mode="json")["candidates"]
    return _plain(runs) / "checkpoints" / f"{recipe.name}-{digest(sections)[7:19]}"


def _forget(checkpoints: Path) -> list[Path]:
    """Delete a recipe's checkpoints; gives those of trainings that another run is at."""
    from flagscale.execution.exclusive import delete_unless_held

    names = sorted({path.name.partition(".")[0] for path in checkpoints.glob("*")})
    held = [checkpoints / name for name in names if not delete_unless_held(checkpoints / name)]
    with suppress(OSError):  # it is not empty, or not there
        checkpoints.rmdir()
    return held


def run_pipeline(
    pipeline: BaseComponent,
    arguments: dict[str, Any],
    recipe: Recipe,
    runs: Path,
    reuse: bool,
    containers: Containers | None = None,
    *,
    is_whole: bool = True,
) -> RunResult:
    """Run any pipeline whose steps use `step_process`, tracked and stoppable.

    Args:
        pipeline: its steps run on this machine, one after the other.
        arguments: of the pipeline.
        recipe: names the run and its experiment, and is logged.
        runs: folder of all runs.
        reuse: False to repeat every step.
        containers: where the steps run; None: as processes.
        is_whole: whether it has all that people look for in `latest`, which then points to it.

    Raises:
        UserError: the tracking server is not usable.
        StepFailed: a step failed.
        Stopped: a signal came, and the running step has ended.
    """
    from flagscale import tracking

    runs = _plain(runs)
    begin, given = time.monotonic(), carried(arguments)
    folder = _run_folder(runs, recipe.name)
    if is_whole:
        _point_latest(folder)
    (folder / "recipe.yaml").write_text(tracking.recipe_yaml(recipe), encoding="utf-8")
    stopper = Stopper()
    with (
        quiet_kfp(folder / "run.log") as exceptions,
        stopper.handling(),
        tracking.pipeline_run(recipe, runs) as run,
    ):
        result = RunResult(folder, run.uri, run.page)
        steps = Steps(result, run, stopper, Plan(pipeline, arguments))
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
                if containers:
                    containers.run(pipeline, given)
                else:
                    pipeline(**given)
            except RuntimeError as error:  # KFP's, which does not say why
                raise steps.failure(error, exceptions) from error
        result.seconds = time.monotonic() - begin
        run.log_metrics({f"seconds/{name}": step.seconds for name, step in result.steps.items()})
        for name in ("evaluate", "leaderboard"):
            if name in result.steps:  # so that runs compare without opening their children
                run.log_metrics(read_scalars(result.steps[name].outputs))
                run.describe(read_summary(result.steps[name].outputs))
    return result


def _plain(runs: Path) -> Path:
    """Absolute and without `..`, as KFP, the cache's keys and the engine of containers take it."""
    return Path(os.path.abspath(runs))


def _run_folder(runs: Path, name: str) -> Path:
    """A new folder for a run."""
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H-%M-%S")
    folder = runs / f"{stamp}-{name}"
    number = 1
    while folder.exists():
        number += 1
        folder = runs / f"{stamp}-{name}-{number}"
    folder.mkdir(parents=True)
    return folder


def _point_latest(folder: Path) -> None:
    link = folder.parent / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, folder.parent / LATEST)


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
