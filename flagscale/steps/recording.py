"""What MLflow is shown of the models that steps make and measure, and of the machines they use."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flagscale import tracking
from flagscale.artifacts import Manifest
from flagscale.evaluation.figures import AFTER
from flagscale.execution.launch import is_first_rank
from flagscale.shared import location_of
from flagscale.train.checkpoints import CURVES

logger = logging.getLogger(__name__)


@contextmanager
def watched(run: tracking.StepRun) -> Iterator[None]:
    """Inside, every machine of a training tells of itself, in the first rank's run.

    All ranks call it, within the runtime. Where the server has not made the run yet, the first
    rank's machine alone does.
    """
    told = [run.run_id]
    torch.distributed.broadcast_object_list(told)
    if is_first_rank():
        with tracking.system_metrics(run):
            yield
    elif not tracking.is_nodes_first_rank():
        yield
    else:
        with tracking.attached(told[0]) as theirs, tracking.system_metrics(theirs):
            yield


def record_distilled(
    run: tracking.StepRun,
    step: int,
    output: Path,
    manifest: Manifest,
    points: Sequence[tracking.Point],
    validation: tracking.Split,
) -> None:
    """Show a trained student, and its whole curves.

    Args:
        run: of distil-student.
        step: whose weights these are.
        output: the artifact.
        manifest: its.
        points: the step's validation figures, as the run has them.
        validation: what those are of.
    """
    run.describe(
        f"The weights of step {step} are the student's: `{location_of(manifest, output)}`. The "
        f"curves show at most some {tracking.MOST_POINTS:,} points each; {' and '.join(CURVES)} "
        "among the artifacts have every step and every loss."
    )
    for name in CURVES:
        run.log_artifact(output / name)
    run.log_weights(
        tracking.Model(
            "distilled",
            step,
            location_of(manifest, output),
            digest=manifest.digest,
            points=points,
            split=validation,
        )
    )


def tell_figures(
    run: tracking.StepRun,
    figures: Mapping[str, float],
    models: Mapping[str, Manifest],
    test: tracking.Split,
) -> None:
    """Show what was measured, of models that MLflow knows also as the models' figures.

    Args:
        run: of the step that measured.
        figures: `<model>/<figure>` and others.
        models: by name.
        test: what was measured on.
    """
    run.log_inputs([test], ["test"])
    show_models(run, run.log_headline(figures), models, test)


def show_models(
    run: tracking.StepRun,
    points: Sequence[tracking.Point],
    models: Mapping[str, Manifest],
    measured_on: tracking.Split | None = None,
) -> None:
    """Show figures of a run as those of the models that MLflow knows.

    Args:
        run: of the step that measured.
        points: `<model>/<figure>` and others, as the run has them.
        models: by name.
        measured_on: a split of the data; None for a task, which its figure's name says.
    """
    for name, manifest in models.items():
        own = [point for point in points if point.name.startswith(f"{name}/")]
        run.log_figures_of(manifest.digest, own, measured_on)


def register_export(
    run: tracking.StepRun,
    name: str,
    output: Path,
    manifest: Manifest,
    step: int,
    figures: Mapping[str, float],
    dataset_digest: str,
) -> None:
    """Register an exported student, with what was measured of it, as the candidate.

    Args:
        run: of export-student.
        name: in MLflow's registry.
        output: the `export` artifact.
        manifest: its.
        step: whose weights these are.
        figures: of the evaluation: `<model>/<figure>` and others.
        dataset_digest: of the data that it was measured on.
    """
    params: dict[str, Any] = {
        key: manifest.facts[key] for key in ("format", "dtype", "bytes") if key in manifest.facts
    }
    own = {name: value for name, value in figures.items() if name.startswith(f"{AFTER}/")}
    model = tracking.Model(
        name,
        step,
        location_of(manifest, output),
        digest=manifest.digest,
        params=params,
        points=run.log_metrics(own),
        split=tracking.Split("test", dataset_digest),
    )
    uri = run.log_model(output, name, model)
    if uri:
        logger.info("registered in MLflow as %s", uri)
