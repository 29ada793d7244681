"""What MLflow has of a run: the figures of its steps, its tree, the student's weights."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow import MlflowClient

from flagscale.tracking import KFP_RUN_TAG, PARENT_TAG
from flagscale.tracking.names import OF_KFP_RUN_TAG
from flagscale.tracking.server import environment
from tests.cluster.runs import STEPS
from tests.cluster.table import Failed

Figures = dict[str, dict[str, float]]  # by step, by name

# One run of the same code differs from the next in these.
_OF_ITS_TIME = re.compile(r"second|memory|throughput|system/")
# Other kinds of CPU add in another order, and a training carries that on. Below `_NOISE` figures
# are differences that should be 0.
TOLERANCE = 0.01
_NOISE = 1e-3


@dataclass(frozen=True)
class Tracking:
    """An experiment of a tracking server."""

    uri: str
    experiment: str

    def runs(self) -> list[Any]:
        """All runs of the experiment."""
        client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            raise Failed(f"MLflow has no experiment {self.experiment}")
        return list(client.search_runs([found.experiment_id], max_results=1000))

    def children(self, kfp_run: str | None) -> dict[str, Any]:
        """The steps' runs by name: of a KFP run, or of the only run there is."""
        found: dict[str, Any] = {}
        for run in self.runs():
            tags = run.data.tags
            is_of_it = kfp_run is None or tags.get(OF_KFP_RUN_TAG) == kfp_run
            if PARENT_TAG in tags and is_of_it and run.info.run_name in STEPS:
                found[run.info.run_name] = run
        return found

    def figures(self, kfp_run: str | None = None) -> Figures:
        """Every step's figures but for times and sizes."""
        return {
            name: {k: v for k, v in run.data.metrics.items() if not _OF_ITS_TIME.search(k)}
            for name, run in self.children(kfp_run).items()
        }

    def check_tree(self, kfp_run: str) -> str:
        """One run with all steps below it, and all of them finished.

        Raises:
            Failed: it is another tree.
        """
        runs = {run.info.run_id: run for run in self.runs()}
        children = self.children(kfp_run)
        absent = [step for step in STEPS if step not in children]
        if absent:
            raise Failed(f"run {kfp_run}: MLflow lacks {', '.join(absent)}")
        roots = {_root(run, runs).info.run_id for run in children.values()}
        if len(roots) != 1:
            raise Failed(f"run {kfp_run}: its steps are in {len(roots)} trees of MLflow")
        root = runs[roots.pop()]
        unfinished = {
            run.info.run_name: run.info.status
            for run in (root, *children.values())
            if run.info.status != "FINISHED"
        }
        if unfinished:
            raise Failed(f"run {kfp_run}: {unfinished}")
        if root.data.tags.get(KFP_RUN_TAG, kfp_run) != kfp_run:
            raise Failed(f"run {kfp_run}: its steps are below another run's")
        return root.info.run_id

    def check_closed(self) -> None:
        """Nothing goes on in the experiment.

        Raises:
            Failed: a run does.
        """
        running = [r.info.run_name for r in self.runs() if r.info.status not in _CLOSED]
        if running:
            raise Failed(f"still open in MLflow: {', '.join(running)}")

    def weights(self, model: str) -> str:
        """A digest of the newest version of a registered student.

        Raises:
            Failed: there is none, or it has no weights.
        """
        client = MlflowClient(self.uri)
        versions = client.search_model_versions(f"name='{model}'")
        if not versions:
            raise Failed(f"MLflow has no model {model}")
        newest = max(versions, key=lambda v: int(v.version))
        with TemporaryDirectory() as folder:
            with environment({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}):
                mlflow.set_tracking_uri(self.uri)  # a model is looked up in the process' own
                mlflow.artifacts.download_artifacts(
                    f"models:/{model}/{newest.version}", dst_path=folder
                )
            files = sorted(Path(folder).rglob("*.safetensors"))
            if not files:
                raise Failed(f"model {model}: no weights in it")
            digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
        return digest.hexdigest()[:16]


_CLOSED = ("FINISHED", "FAILED", "KILLED")


def _root(run: Any, runs: dict[str, Any]) -> Any:
    while run.data.tags.get(PARENT_TAG) in runs:
        run = runs[run.data.tags[PARENT_TAG]]
    return run


def compare(ours: Figures, theirs: Figures, steps: tuple[str, ...] = STEPS) -> str:
    """How far apart the figures of two runs are.

    Raises:
        Failed: a step or a figure is missing on one side, or further apart than `TOLERANCE`.
    """
    furthest, where, count = 0.0, "", 0
    for step in steps:
        here, there = ours.get(step, {}), theirs.get(step, {})
        if not here or here.keys() != there.keys():
            odd = sorted(here.keys() ^ there.keys())
            raise Failed(f"{step}: only one side has {', '.join(odd) or 'any figures'}")
        for name in here:
            count += 1
            apart = _apart(here[name], there[name])
            if apart > TOLERANCE:
                raise Failed(
                    f"{step}: {name} is {here[name]:g} in one and {there[name]:g} in the other"
                )
            if apart > furthest:
                furthest, where = apart, f", {step}'s {name}"
    if not furthest:
        return f"{count} figures, equal to the last digit"
    return f"{count} figures, {furthest:.1e} apart at most{where} (allowed: {TOLERANCE:g})"


def _apart(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), _NOISE)
