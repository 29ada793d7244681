"""One tree a run, each step once in it, whatever KFP's MLflow plugin does: on a real store."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest

from flagscale import tracking
from flagscale.errors import Interrupted
from flagscale.execution.metrics_file import write_metrics
from flagscale.steps.record_run import record_run
from flagscale.tracking import kfp_run
from tests.flagscale.tracking.kfp_plugin import NoPlugin, Plugin, below, pod, roots, tree

STEPS = ("prepare-data", "distil-student", "evaluate")
OWN_TREE = """\
tiny FINISHED
  prepare-data FINISHED
  distil-student FINISHED
  evaluate FINISHED
"""
PLUGINS_TREE = """\
of KFP FINISHED
  prepare-data FINISHED
    prepare-data FINISHED
  distil-student FINISHED
    distil-student FINISHED
  evaluate FINISHED
    evaluate FINISHED
  record-run FINISHED
"""
OWN_TREE_CACHED = """\
tiny FINISHED
  evaluate FINISHED
  prepare-data FINISHED  from the cache
  distil-student FINISHED  from the cache
"""
PLUGINS_TREE_CACHED = """\
of KFP FINISHED
  prepare-data FINISHED
    prepare-data FINISHED  from the cache
  distil-student FINISHED
    distil-student FINISHED  from the cache
  evaluate FINISHED
    evaluate FINISHED
  record-run FINISHED
"""


class Cluster:
    """A KFP server with steps that track, on one MLflow store.

    Args:
        uri: of the store.
        folder: for the files of figures.
        secret: whether the platform's secret names the store.
        make: KFP's own part in a run, by the run's id.
    """

    def __init__(
        self, uri: str, folder: Path, secret: bool, make: Callable[[str], NoPlugin]
    ) -> None:
        self._folder, self._make = folder, make
        self._surroundings = {"FLAGSCALE_RUN_NAME": "tiny", "MLFLOW_EXPERIMENT_NAME": "ours"}
        if secret:
            self._surroundings["FLAGSCALE_MLFLOW_TRACKING_URI"] = uri

    def run(self, kfp_run_id: str, cached: tuple[str, ...] = ()) -> None:
        """A pipeline run to its good end; a training is killed once on the way."""
        kfp = self._make(kfp_run_id)
        for task in STEPS:
            figures = {"kl": float(len(task))}
            if task in cached:
                kfp.serves_from_cache(task, figures)
                continue
            if task == "distil-student":
                self._step(kfp, task, figures, Interrupted())
            self._step(kfp, task, figures)
            kfp.ends(task, figures)
        with pod({**kfp.starts("record-run"), **self._surroundings}):
            record_run({task: [self._metrics(task)] for task in STEPS})
        kfp.ends("record-run", {})
        kfp.finishes("FINISHED")

    def _step(
        self, kfp: NoPlugin, task: str, figures: dict[str, float], error: Exception | None = None
    ) -> None:
        with pod({**kfp.starts(task), **self._surroundings}), suppress(Interrupted):
            training = "checkpoints" if task == "distil-student" else None
            with tracking.step_run(task, {task: {"lr": 0.5}}, training) as run:
                run.log_metrics({**figures, "only in MLflow": 1.0})
                if task == "evaluate":
                    run.log_headline(figures)
                if error:
                    raise error
            write_metrics(self._metrics(task), figures)

    def _metrics(self, task: str) -> Path:
        return self._folder / task / "metrics"


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> str:
    monkeypatch.setattr(kfp_run, "_SETTLE_SECONDS", 0.05)
    return f"sqlite:///{empty_store}"


@pytest.fixture
def client(uri: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(uri)


@pytest.fixture(params=["off", "injecting", "injecting, no secret", "not injecting"])
def cluster(request: pytest.FixtureRequest, uri: str, tmp_path: Path) -> tuple[Cluster, str]:
    """KFP as its administrator has set it up, and the tree that is expected there."""
    how = request.param
    if how == "off":
        return Cluster(uri, tmp_path, True, NoPlugin), "own"
    injects = how.startswith("injecting")

    def make(kfp_run_id: str) -> NoPlugin:
        return Plugin(kfp_run_id, uri, "KFP-Default", injects)

    return Cluster(uri, tmp_path, "no secret" not in how, make), "plugin's"


def test_a_run_has_one_tree(cluster: tuple[Cluster, str], client: mlflow.MlflowClient) -> None:
    kfp, whose = cluster
    kfp.run("first")
    (root,) = roots(client)
    assert tree(client, root) == (OWN_TREE if whose == "own" else PLUGINS_TREE)
    expected = {"kl": 8.0} if whose == "own" else {}  # KFP's own run is left alone
    assert root.data.metrics == expected


def test_a_partly_cached_run_shows_every_step_and_where_it_comes_from(
    cluster: tuple[Cluster, str], client: mlflow.MlflowClient
) -> None:
    kfp, whose = cluster
    kfp.run("first")
    kfp.run("second", cached=("prepare-data", "distil-student"))
    first, second = roots(client)
    assert tree(client, second) == (OWN_TREE_CACHED if whose == "own" else PLUGINS_TREE_CACHED)
    originals, copies = (ours(client, root.info.run_id) for root in (first, second))
    for step in ("prepare-data", "distil-student"):
        copy, original = copies[step], originals[step]
        assert copy.data.tags[tracking.CACHED_TAG] == original.info.run_id
        assert copy.data.tags["flagscale.cached_from_kfp_run"] == "first"
        assert copy.data.params == original.data.params == {f"{step}.lr": "0.5"}
        assert copy.data.metrics == original.data.metrics
        assert copy.data.metrics["only in MLflow"] == 1.0


def ours(client: mlflow.MlflowClient, root: str) -> dict[str, mlflow.entities.Run]:
    """The steps' own runs below a root, by name."""
    found = {}
    for run in below(client, root):
        for one in [run, *below(client, run.info.run_id)]:
            if "flagscale.of_kfp_run" in one.data.tags:
                assert one.info.run_name not in found
                found[one.info.run_name] = one
    return found


def test_a_run_that_is_cached_in_full_is_there_and_compares(
    cluster: tuple[Cluster, str], client: mlflow.MlflowClient
) -> None:
    kfp, _whose = cluster
    kfp.run("first")
    kfp.run("second", cached=STEPS)
    kfp.run("third", cached=STEPS)
    first, second, third = roots(client)
    assert third.info.status == "FINISHED"
    assert third.data.metrics == second.data.metrics == first.data.metrics
    copies = ours(client, third.info.run_id)
    assert sorted(copies) == sorted(STEPS)
    # Of the run that did the work, not of the one that showed it last.
    originals = ours(client, first.info.run_id)
    assert {name: run.data.tags[tracking.CACHED_TAG] for name, run in copies.items()} == {
        name: run.info.run_id for name, run in originals.items()
    }


def test_a_plugin_on_another_server_leaves_ours_a_tree_of_its_own(
    uri: str, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    elsewhere = f"sqlite:///{tmp_path}/kfps.db"
    kfp = Cluster(uri, tmp_path, True, lambda run: Plugin(run, elsewhere, "KFP-Default", False))
    kfp.run("first")
    (root,) = roots(client)
    assert tree(client, root) == OWN_TREE


def test_variants_whose_tasks_are_alike_go_below_the_plugins_run(
    uri: str, client: mlflow.MlflowClient
) -> None:
    plugin = Plugin("sweep", uri, "ours", injects=False)
    pods = [plugin.starts("evaluate"), plugin.starts("evaluate again")]
    for run in below(client, plugin.parent):
        client.update_run(run.info.run_id, name="evaluate")
    for environment in pods:
        with pod({**environment, "FLAGSCALE_MLFLOW_TRACKING_URI": uri}):
            with tracking.step_run("evaluate", {}) as run:
                pass
            found = client.get_run(str(run.run_id))
            assert found.data.tags[tracking.PARENT_TAG] == plugin.parent


def test_the_platforms_server_is_used_with_its_own_credentials_only(uri: str) -> None:
    """KFP gives pods the credentials of the plugin's server, whether it injects or not."""
    given = Plugin("credentials", uri, "ours", injects=False).starts("evaluate")
    with pod({**given, "FLAGSCALE_MLFLOW_TRACKING_URI": "http://ours:5000"}):
        assert tracking.server.tracking_uri() == "http://ours:5000"
        assert "MLFLOW_TRACKING_USERNAME" not in os.environ
        assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    ours = {
        "FLAGSCALE_MLFLOW_TRACKING_URI": "http://ours:5000",
        "FLAGSCALE_MLFLOW_TRACKING_USERNAME": "me",
        "FLAGSCALE_MLFLOW_TRACKING_PASSWORD": "mine",
    }
    with pod({**given, **ours}):
        assert tracking.server.tracking_uri() == "http://ours:5000"
        assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
        assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "mine"
    injected = Plugin("injected", uri, "ours", injects=True).starts("evaluate")
    with pod({**injected, **ours}):
        assert tracking.server.tracking_uri() == uri
        assert os.environ["MLFLOW_TRACKING_USERNAME"] == "kfp"
