"""A cluster that acts out runs of the tiny recipe, for the checks of `make test-cluster`.

KFP's API is the strict one of kfp_server.py; what becomes of a run is scripted by the last word of
its name, and its tasks are listed as the real backend lists them. MLflow is real, its runs are
written here as the steps write them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from flagscale.tracking import KFP_RUN_TAG, PARENT_TAG
from flagscale.tracking.names import OF_KFP_RUN_TAG
from tests.cluster.runs import FIRST, STEPS
from tests.pipelines.cluster.kfp_api import CLIENT, Refused, Request
from tests.pipelines.cluster.kfp_server import KfpServer

_BEGIN = datetime(2026, 11, 28, 9, 29, 45, tzinfo=UTC)
_RUN = re.compile(r"/apis/v2beta1/runs/([^/:]+)(:terminate)?")
_VERSION_OR_EXPERIMENT = re.compile(
    r"/apis/v2beta1/(?:pipelines/[^/]+/versions|experiments)/([^/]+)"
)


@dataclass
class Acts:
    """What the cluster does; a test changes what it does wrong."""

    outcomes: dict[str, str] = field(default_factory=dict)  # by the run's last word
    cached: int = 7  # of the second run's eight steps: the last one is never
    mistake_fails: str = FIRST
    mistake_begins: tuple[str, ...] = ()
    mistake_attempts: int = 1
    mistake_seconds: int = 6
    attempts_after_a_blow: int = 2
    resumes_after: int | None = 50
    variants: int = 2
    keeps_schedules: bool = False
    keeps_runs: bool = False
    figures: dict[str, float] = field(default_factory=dict)  # by the run's last word
    weights: dict[str, str] = field(default_factory=dict)  # by the run's last word
    lacks: str = ""  # a step, in MLflow
    leaves_open: str = ""  # a step that stays RUNNING there
    policy: str = "{limit: '2', retryPolicy: OnError}"
    trainer: bool = True


@dataclass
class ActingKfp(KfpServer):
    """KFP's API; a run goes on at each look, and an interrupted one once its pod was struck."""

    acts: Acts = field(default_factory=Acts)
    mlflow: str = ""
    folder: Path = Path()
    struck: set[str] = field(default_factory=set)
    tracked: set[str] = field(default_factory=set)

    def answer(self, request: Request) -> Any:
        of_run = _RUN.fullmatch(request.path)
        kept = _VERSION_OR_EXPERIMENT.fullmatch(request.path)
        if of_run and of_run[1] in self.runs:
            return self._of_run(request, of_run[1])
        if request.method == "DELETE" and kept:
            where = self.versions if kept[1] in self.versions else self.experiments
            del where[kept[1]]
            return {}
        if request.method == "DELETE" and "recurringruns" in request.path:
            return {} if self.acts.keeps_schedules else super().answer(request)
        return super().answer(request)

    def _of_run(self, request: Request, run_id: str) -> Any:
        if request.method == "GET":
            return self._look(run_id)
        if request.method == "DELETE":
            if self.acts.keeps_runs:
                raise Refused(500, "Internal: database is locked")
            del self.runs[run_id]
        return {}

    def _look(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        number = self.looks[run_id] = self.looks.get(run_id, -1) + 1
        what = run.display_name.split()[-1]
        waits = what in ("deleted", "killed") and run_id not in self.struck
        default = "FAILED" if what == "mistake" else "SUCCEEDED"
        state = self.acts.outcomes.get(what, default)
        if (state == "SUCCEEDED" and waits) or number < 2:
            state = "RUNNING"
        if state == "SUCCEEDED" and run_id not in self.tracked:
            self.tracked.add(run_id)
            self._track(run, what)
        answer: dict[str, Any] = CLIENT.sanitize_for_serialization(run)
        return answer | {"state": state, "run_details": {"task_details": self._tasks(what, state)}}

    def _tasks(self, what: str, state: str) -> list[dict[str, Any]]:
        names = ("distillation-vbrgc", "distillation-vbrgc(0)", "root", "root(0)")
        listed = [_task(name, state) for name in names]
        listed += [{"task_id": "d52bf4b7-9acf-445a-8fd0-3dcb612ad8a3", "execution_id": "7"}]
        if state == "RUNNING":
            return listed
        return listed + [task for one in self._steps(what, state) for task in one]

    def _steps(self, what: str, state: str) -> list[list[dict[str, Any]]]:
        acts = self.acts
        if what == "mistake":
            failed = _step(acts.mistake_fails, state, acts.mistake_attempts, acts.mistake_seconds)
            begun = [_step(name, "SUCCEEDED") for name in acts.mistake_begins]
            return [failed, *begun, [_task(name, None) for name in STEPS]]
        if what == "sweep":
            names = (*STEPS[:2], *STEPS[2:5] * acts.variants, "leaderboard", "export-winner")
            return [_step(name, state) for name in names]
        attempts = dict.fromkeys((FIRST, *STEPS, "record-run"), 1)
        if what == "cached":
            attempts |= dict.fromkeys([*attempts][: acts.cached], 0)
        if what in ("deleted", "killed"):
            attempts["distil-student"] = acts.attempts_after_a_blow
        if what == "nodes":
            attempts["distil-student-on-nodes"] = attempts.pop("distil-student")
        return [_step(name, state, count) for name, count in attempts.items()]

    def _track(self, run: Any, what: str) -> None:
        client = MlflowClient(self.mlflow)
        name = run.display_name.split()[0]
        found = client.get_experiment_by_name(name)
        location = (self.folder / "artifacts").as_uri()
        experiment = found.experiment_id if found else client.create_experiment(name, location)
        wrong = self.acts if what == "first" else Acts()
        figure = self.acts.figures.get(what, 4.5)
        parent = write_runs(client, experiment, figure, run.run_id, wrong.lacks, wrong.leaves_open)
        if what in ("first", "deleted", "killed"):
            model = name if what == "first" else f"{name}-{what}"
            (self.folder / model).mkdir()
            text = self.acts.weights.get(what, "the weights")
            (self.folder / model / "model.safetensors").write_text(text)
            client.log_artifacts(parent, str(self.folder / model), "model")
            client.create_registered_model(model)
            source = f"runs:/{parent}/model"
            client.create_model_version(model, source, parent, await_creation_for=0)


def write_runs(
    client: MlflowClient,
    experiment: str,
    figure: float,
    kfp_run: str = "none",
    lacks: str = "",
    leaves_open: str = "",
) -> str:
    """A pipeline's run with its steps' below it; gives the parent's id."""
    parent = client.create_run(experiment, tags={KFP_RUN_TAG: kfp_run}).info.run_id
    for step in STEPS:
        if step == lacks:
            continue
        tags = {PARENT_TAG: parent, OF_KFP_RUN_TAG: kfp_run}
        child = client.create_run(experiment, run_name=step, tags=tags).info.run_id
        client.log_metric(child, "loss", figure)
        client.log_metric(child, "max_logit_difference", figure / 1e7)
        client.log_metric(child, "tokens per second", float(hash(child) % 1000))
        if step != leaves_open:
            client.set_terminated(child)
    client.set_terminated(parent)
    return parent


def _step(name: str, state: str, attempts: int = 1, seconds: int = 6) -> list[dict[str, Any]]:
    """A step as the backend lists it; without an attempt it was cached."""
    pods = [_task(f"executor({n})", "FAILED", seconds) for n in range(attempts)]
    if pods:
        pods[-1]["state"] = state
    drivers = [_task(f"{name}-driver{suffix}", "SUCCEEDED", 10) for suffix in ("", "(0)")]
    both = [_task(f"{name}{suffix}", state, seconds + 10) for suffix in ("", "(0)")]
    executor = _task("executor", state if attempts else "SKIPPED", seconds)
    return [*drivers, *both, executor, *pods]


def _task(name: str, state: str | None, seconds: int = 60) -> dict[str, Any]:
    end = _BEGIN + timedelta(seconds=seconds)
    task = {
        "task_id": f"{name}-{seconds}",
        "display_name": name,
        "start_time": _BEGIN.isoformat(),
        "end_time": end.isoformat(),
    }
    return task | ({"state": state} if state else {})
