"""The checks of `make test-cluster`, on a cluster that acts well and on such that do not."""

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flagscale.tracking import step_run
from tests.cluster import pods
from tests.cluster.__main__ import check_cluster
from tests.cluster.checks import INTERRUPTED, Checks
from tests.cluster.figures import Tracking
from tests.cluster.runs import STEPS, Runs
from tests.cluster.settings import ROOT, Settings
from tests.cluster.table import FAIL, PASS, SKIPPED, Table
from tests.pipelines.cluster.acting_cluster import ActingKfp, Acts, write_runs
from tests.pipelines.cluster.acting_pods import ActingPods

NAME = "tiny-0a1b2c3d"
PLATFORM = "gke-h100"
CHECKS = (
    "retries: the policy",
    "pipeline and run accepted",
    "schedule made and removed",
    "mistake refused by the first task",
    "run from data to report",
    "cached the second time",
    "figures of a run on this machine",
    "training's pod deleted: retried, resumed",
    "main process killed: retried, resumed",
    "weights of an undisturbed run",
    "training on two nodes",
    "sweep of two",
    "MLflow: trees complete and closed",
    "cleaned up",
)
GOOD_POLICY = (
    "{limit: '2', retryPolicy: Always, expression: 'lastRetry.status == \"Error\" || "
    '(asInt(lastRetry.exitCode) in [137, 143] && !(lastRetry.message contains "OOMKilled"))\'}'
)


class Here:
    """A finished run on this machine; by then the pods to be lost must be."""

    def __init__(self, tracking: Tracking, kfp: ActingKfp) -> None:
        self.tracking, self.kfp = tracking, kfp

    def finish(self, seconds: float) -> Tracking:
        assert seconds > 0
        for run in self.kfp.runs.values():
            if run.display_name.split()[-1] in INTERRUPTED:
                assert run.run_id in self.kfp.struck
        return self.tracking


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's database with a run of this machine in it."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    location = (folder / "artifacts").as_uri()
    write_runs(client, client.create_experiment("here", artifact_location=location), 4.5)
    return uri


@pytest.fixture
def acting(
    kfp: object, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ActingKfp]:
    """A cluster that does everything right; `kfp` hides this machine's own configuration."""
    server = ActingKfp(acts=Acts(policy=GOOD_POLICY), mlflow=store, folder=tmp_path)
    with server.serving(), ActingPods(server).serving(tmp_path) as kubeconfig:
        monkeypatch.setenv("KFP_ENDPOINT", server.url)
        location = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
        monkeypatch.setattr(location, str(kubeconfig))
        yield server


def settings(store: str | None, kubeconfig: bool = True, shared: str | None = "/mnt") -> Settings:
    return Settings(
        platform=PLATFORM,
        teacher="/mnt/flagscale/tiny-teacher",
        name=NAME,
        namespace="kubeflow",
        shared=shared,
        kubeconfig=kubeconfig,
        tracking=store,
    )


def outcomes(kfp: ActingKfp, given: Settings, store: str) -> dict[str, tuple[str, str]]:
    """Outcome and what was seen, by check."""
    table = Table(io.StringIO())
    local = Here(Tracking(store, "here"), kfp) if given.tracking else None
    Checks(given, table, Runs(given, pause_seconds=0.01), local).go()
    assert table.end() == any(row.outcome == FAIL for row in table.rows)
    return {row.name: (row.outcome, row.seen) for row in table.rows}


def test_a_good_cluster_passes_and_is_left_as_it_was(acting: ActingKfp, store: str) -> None:
    seen = outcomes(acting, settings(store), store)
    assert tuple(seen) == CHECKS
    assert {name: row for name, row in seen.items() if row[0] != PASS} == {}
    assert "7 of 8 steps from the cache" in seen["cached the second time"][1]
    assert "equal to the last digit" in seen["figures of a run on this machine"][1]
    for check in CHECKS[7:9]:
        assert "attempt 2 went on after step 50" in seen[check][1]
    left = (acting.runs, acting.schedules, acting.versions, acting.pipelines, acting.experiments)
    assert not any(left)
    client = MlflowClient(store)
    assert client.get_experiment_by_name(NAME).lifecycle_stage == "deleted"
    assert not client.search_registered_models(f"name LIKE '{NAME}%'")


@pytest.mark.parametrize(
    ("acts", "faults"),
    [
        (
            Acts(
                policy="{retryPolicy: Always}",
                keeps_schedules=True,
                mistake_begins=("prepare-data",),
                cached=3,
                figures={"first": 4.6, "nodes": 4.7},
                attempts_after_a_blow=1,
                variants=1,
                leaves_open="evaluate",
                keeps_runs=True,
            ),
            {
                CHECKS[0]: "a mistake is repeated",
                CHECKS[2]: "is still there",
                CHECKS[3]: "a mistake started prepare-data",
                CHECKS[5]: "3 of 8 steps came from the cache",
                CHECKS[6]: "prepare-data: loss is 4.5 in one and 4.6 in the other",
                CHECKS[7]: "there was one attempt",
                CHECKS[8]: "there was one attempt",
                CHECKS[10]: "evaluate: loss is 4.6 in one and 4.7 in the other",
                CHECKS[11]: "1 trainings of 2",
                CHECKS[12]: "'evaluate': 'RUNNING'",
                CHECKS[13]: "database is locked",
            },
        ),
        (
            Acts(
                mistake_fails="prepare-teacher",
                resumes_after=None,
                weights={"killed": "other weights"},
                lacks="convert-student",
                outcomes={"sweep": "FAILED", "nodes": "FAILED"},
            ),
            {
                CHECKS[0]: "a pod that was stopped (143) is not repeated",
                CHECKS[3]: "a mistake started prepare-teacher",
                CHECKS[6]: "convert-student: only one side has loss, max_logit_difference",
                CHECKS[7]: "attempt 2 began at step 0",
                CHECKS[8]: "attempt 2 began at step 0",
                CHECKS[9]: "killed: weights ",
                CHECKS[10]: "the run FAILED",
                CHECKS[11]: "the run FAILED",
                CHECKS[12]: "MLflow lacks convert-student",
            },
        ),
        (
            Acts(
                policy=GOOD_POLICY,
                mistake_attempts=18,
                outcomes={"deleted": "FAILED", "killed": "FAILED", "cached": "CANCELED"},
                trainer=False,
            ),
            {
                CHECKS[3]: "a mistake was tried 18 times",
                CHECKS[5]: "the run CANCELED",
                CHECKS[7]: "the run FAILED: ",
                CHECKS[8]: "the run FAILED: ",
            },
        ),
    ],
)
def test_every_fault_is_seen(
    acting: ActingKfp, store: str, acts: Acts, faults: dict[str, str], tmp_path: Path
) -> None:
    acting.acts = acts
    _fresh(store)
    seen = outcomes(acting, settings(store), store)
    failed = {name: text for name, (outcome, text) in seen.items() if outcome == FAIL}
    assert failed.keys() == faults.keys(), failed
    for name, text in faults.items():
        assert text in failed[name]


def _fresh(store: str) -> None:
    """MLflow's experiments are deleted softly; a go has a name of its own, tests have one."""
    client = MlflowClient(store)
    found = client.get_experiment_by_name(NAME)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        client.rename_experiment(found.experiment_id, f"{NAME}-{found.experiment_id}")


def test_what_is_not_here_is_skipped_and_the_table_says_all(acting: ActingKfp) -> None:
    acting.acts.cached = 0
    table = Table(out := io.StringIO())
    given = settings(None, kubeconfig=False)
    assert check_cluster(given, table, pause_seconds=0.01) == 1
    skipped = {row.name: row.seen for row in table.rows if row.outcome == SKIPPED}
    for check in (CHECKS[0], *CHECKS[7:9], CHECKS[10]):
        assert skipped.pop(check).startswith("KUBECONFIG is not set")
    for check in (CHECKS[6], CHECKS[9], CHECKS[12]):
        assert skipped.pop(check).startswith("MLFLOW_TRACKING_URI is not set")
    assert not skipped

    told, _, shown = out.getvalue().partition("\n\n")
    assert told.startswith(f"{NAME} on {PLATFORM}, at most 20 minutes\n")
    head, rule, *rows, _, last = shown.rstrip("\n").split("\n")
    assert head.split() == ["check", "outcome", "time", "seen"]
    assert set(rule) == {"-"}
    assert tuple(row[:44].strip() for row in rows) == CHECKS
    assert rows == told.split("\n")[1:]
    assert re.fullmatch(r"6 passed, 1 failed, 7 skipped, .* s", last)


def test_without_a_first_run_the_rest_is_skipped(acting: ActingKfp, store: str) -> None:
    acting.acts.outcomes["first"] = "FAILED"
    seen = outcomes(acting, settings(None), store)
    assert seen[CHECKS[4]][0] == FAIL
    for check in (CHECKS[5], *CHECKS[7:9], CHECKS[10]):
        assert seen[check] == (SKIPPED, "the first run did not succeed")
    assert not acting.runs


def test_there_is_an_end(acting: ActingKfp, store: str) -> None:
    acting.acts.outcomes["first"] = "RUNNING"
    given = settings(None, kubeconfig=False)
    table = Table(io.StringIO())
    runs = Runs(given, pause_seconds=0.01)
    runs.deadline = 0.0
    Checks(given, table, runs, None).go()
    seen = {row.name: (row.outcome, row.seen) for row in table.rows}
    assert seen[CHECKS[4]][0] == FAIL
    assert "not within 20 minutes" in seen[CHECKS[4]][1]
    assert not acting.runs, "it is taken away all the same"


def test_figures_are_found_where_the_steps_write_them(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"MLFLOW_TRACKING_URI": store, "MLFLOW_EXPERIMENT_NAME": "written-by-steps"}
    for name, value in (values | {"KFP_RUN_ID": "run-1"}).items():
        monkeypatch.setenv(name, value)
    for number, step in enumerate(STEPS):
        with step_run(step, {"data": {"seq_length": 64}}) as run:
            run.log_metrics({"loss": float(number), "tokens per second": time.monotonic()})
    tracking = Tracking(store, "written-by-steps")
    assert tracking.figures("run-1") == {s: {"loss": float(n)} for n, s in enumerate(STEPS)}
    assert not tracking.figures("run-2")


def test_pods_that_take_no_command_are_no_fault(
    acting: ActingKfp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ActingPods(acting)
    served.has_exec = False
    with served.serving(tmp_path) as kubeconfig:
        location = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
        monkeypatch.setattr(location, str(kubeconfig))
        cluster = pods.Pods("kubeflow")
        pod = cluster.saved("run-1")
        assert pod.metadata.name == "train-run-1-0"
        with pytest.raises(pods.Skipped, match="no command can be run in pods"):
            cluster.kill(pod)


def test_the_page_names_every_check() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) \|", page.partition("| check | passes when |")[2], re.M)
    assert tuple(rows[: len(CHECKS)]) == CHECKS
