"""The launcher against a cluster whose nodes are real processes of this machine."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_server
import pytest
import trainjob_nodes
import yaml
from kubernetes_server import LOST
from trainer import Cluster
from trainjob_nodes import SECRET

from flagscale.errors import UserError
from flagscale.execution.trainjob import cluster as api
from flagscale.execution.trainjob import run as trainjob
from flagscale.execution.trainjob.manifest import Nodes, train_job
from flagscale.execution.trainjob.nodes import NodePods
from flagscale.execution.trainjob.rights import RULES

PATIENCE = 300  # seconds: far more than is needed, on a machine with much else to do
LAUNCHER = """
import json, sys
from pathlib import Path
from flagscale.execution.trainjob.nodes import NodePods
from flagscale.execution.step_process import step_process
from flagscale.execution.trainjob.run import job_name, run_on_nodes
from flagscale.execution.trainjob.manifest import Nodes

with step_process("launcher"):
    what, place, count, restarts = sys.argv[1:]
    nodes = Nodes(int(count), 1, 0, NodePods(cpu="3", restarts=int(restarts)))
    request = {"what": what}
    name = job_name("distil-student", request)
    result = run_on_nodes("ranks", "ranks:run", request, nodes, Path(place), name)
    Path(place, "told.json").write_text(json.dumps(result))
    assert "torch" not in sys.modules
"""


def start(what: str, nodes: int = 1, restarts: int = 2) -> subprocess.Popen:
    place = os.environ["FLAGSCALE_SHARED"]
    command = [sys.executable, "-c", LAUNCHER, what, place, str(nodes), str(restarts)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launch(what: str, nodes: int = 1, restarts: int = 2) -> tuple[int, str]:
    return end(start(what, nodes, restarts))


def end(launcher: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output; a rank that works on does so for longer than is waited for here."""
    output = launcher.communicate(timeout=PATIENCE)[0]
    return launcher.returncode, output


def wait_for(reached, launcher: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert launcher is None or launcher.poll() is None, end(launcher)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_first_ranks_result_and_log_come_back(cluster, tmp_path):
    """Though the log's stream breaks, and the API does not answer for a while.

    What the pod has, the ranks have, secrets by reference.
    """
    cluster.break_log_after = 7
    process = start("environment", nodes=2)
    wait_for(lambda: cluster.jobs, process)
    cluster.troubles = [503] * 3
    code, output = end(process)
    assert code == 0, output
    assert not cluster.troubles
    assert ("get", kubernetes_server.VERSION) in cluster.requests
    assert "control-plane version" not in output, "a page that the SDK prints"
    told = json.loads((tmp_path / "shared/told.json").read_text())
    assert told == {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "3",
        "KFP_RUN_ID": "run-1",
        "NCCL_DEBUG": "WARN",
        "MLFLOW_EXPERIMENT_NAME": "distillation",
        "KFP_POD_NAME": None,
        "FLAGSCALE_SHARED": str(tmp_path / "shared"),
        "secret": SECRET[::-1],
    }
    lines = [line for line in output.splitlines() if "of rank" in line]
    for number, line in enumerate(lines):
        assert re.fullmatch(rf"\[rank 0\] \S+ line {number} of rank 0", line)
    assert len(lines) == 20
    assert "2 nodes x 1 processes" in output
    wait_for(lambda: not cluster.jobs)
    (job,) = cluster.gone
    assert SECRET not in json.dumps(job.manifest)
    assert not list((tmp_path / "shared/launches").iterdir())


@pytest.mark.parametrize("log_hangs", [False, True])
def test_any_nodes_error_becomes_the_steps(cluster, log_hangs):
    """Though Kubernetes starts the failed container anew, node 0 would work on, and no log answers.

    A mistake is made once. What a rank of another node said stands in the launcher's own log, which
    KFP keeps, without secrets.
    """
    cluster.log_hangs = log_hangs
    code, output = launch("error", nodes=2 - log_hangs)
    assert code == 1
    assert output.splitlines()[-1].endswith("launcher: the last node says what is wrong")
    assert ("the first node's log does not answer" in output) == log_hangs
    if not log_hangs:
        assert "the end of the log of rank 1, which failed:\n[rank 1] rank 1 dies; " in output
        assert SECRET not in output
    wait_for(lambda: not cluster.jobs)
    assert len(cluster.gone) == 1


def only_pod(cluster: Cluster) -> str:
    (job,) = cluster.jobs.values()
    (pod,) = job.pods()
    return pod.name


@pytest.mark.parametrize(
    ("loses", "why"),
    [
        (Cluster.drain, "stopped from outside, e.g. because a node is drained: saved step 3"),
        (
            Cluster.lose,  # told by whoever sees it first
            "pod .*-node-0-0-.* (is gone|ended: Error, exit code 137)|rank 0 was killed, and start",
        ),
    ],
    ids=["drained", "lost"],
)
def test_nodes_that_were_lost_are_started_anew(cluster, tmp_path, loses, why):
    process = start("twice")
    wait_for((tmp_path / "shared/0-works").exists, process)
    loses(cluster, only_pod(cluster))
    code, output = end(process)
    assert code == 0, output
    assert re.search(f"{why}.*; starting all nodes anew, at most 2 times", output), output
    assert json.loads((tmp_path / "shared/told.json").read_text()) == "went on"
    wait_for(lambda: not cluster.jobs)
    assert len(cluster.gone) == 2


def test_nodes_that_are_lost_too_often_are_an_error(cluster, tmp_path):
    process = start("twice", restarts=0)
    wait_for((tmp_path / "shared/0-works").exists, process)
    cluster.drain(only_pod(cluster))
    code, output = end(process)
    assert code == 1
    assert output.splitlines()[-1].endswith(
        "is drained: saved step 3; start it again, it goes on from there"
    )


def test_a_time_limit_is_not_begun_anew(cluster, tmp_path):
    """Though its pods are stopped, and are gone then."""
    process = start("twice")
    wait_for((tmp_path / "shared/0-works").exists, process)
    cluster.time_out(name_of(cluster))
    code, output = end(process)
    assert code == 1
    last = output.splitlines()[-1]
    assert last.endswith("DeadlineExceeded: TrainJob exceeded its active deadline"), output
    wait_for(lambda: not cluster.jobs)
    assert len(cluster.gone) == 1


def test_stopped_while_an_earlier_trys_ranks_still_save(cluster, tmp_path):
    first = start("save")
    wait_for((tmp_path / "shared/0-works").exists, first)
    first.kill()
    end(first)
    second = start("save")
    wait_for(lambda: any(job.deleted for job in cluster.jobs.values()), second)
    second.terminate()
    code, output = end(second)
    assert code == 143, output
    assert "interrupted: stopped while TrainJob" in output.splitlines()[-1]


ENDED = "pod .*-node-0-0-.* ended: Error, exit code 1"


@pytest.mark.parametrize(
    ("backoff_limit", "why"),
    [
        (0, ENDED),
        (6, f"rank 0 was killed, and started|{ENDED}"),  # told by whoever sees it first
    ],
)
def test_a_killed_rank_is_told_of(cluster, backoff_limit, why):
    """Whether or not Kubernetes starts its container anew."""
    cluster.backoff_limit = backoff_limit
    code, output = launch("kill", restarts=0)
    assert code == 1
    assert re.search(why, output.splitlines()[-1]), output


def name_of(cluster: Cluster) -> str:
    return next(iter([*cluster.jobs, *(job.name for job in cluster.gone)]))


def after_creation(cluster: Cluster) -> list[tuple[str, str]]:
    """What was asked for since a TrainJob was made: its launcher follows it by then."""
    made = ("create", kubernetes_server.JOBS)
    requests = list(cluster.requests)
    return requests[requests.index(made) :] if made in requests else []


def test_a_launcher_that_waits_for_nodes_says_so_and_can_be_stopped(cluster, tmp_path):
    cluster.schedulable = False
    process = start("environment")
    wait_for(lambda: ("get", kubernetes_server.PODS) in after_creation(cluster), process)
    process.terminate()
    code, output = end(process)
    assert code == 143, output
    assert "interrupted" in output
    wait_for(lambda: not cluster.jobs)


def run_here() -> None:
    nodes = Nodes(2, 1, 0, NodePods())
    shared = Path(os.environ["FLAGSCALE_SHARED"])
    trainjob.run_on_nodes("ranks", "ranks:run", {"what": "count"}, nodes, shared, "j")


def no_trainer(cluster: Cluster) -> None:
    cluster.has_trainer = False


def no_runtime(cluster: Cluster) -> None:
    cluster.runtimes = {}


def another_framework(cluster: Cluster) -> None:
    text = json.dumps(trainjob_nodes.RUNTIME).replace(': "torch"}}', ': "deepspeed"}}')
    cluster.runtimes = {"torch-distributed": json.loads(text)}


def may_not_delete(cluster: Cluster) -> None:
    cluster.denied = {("delete", "trainjobs"), ("get", "clustertrainingruntimes")}


def may_not_create(cluster: Cluster) -> None:
    cluster.denied, cluster.reviews = {("create", "trainjobs")}, False


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_trainer, "Kubeflow Trainer is not installed in this cluster"),
        (no_runtime, "no TrainingRuntime or ClusterTrainingRuntime named 'torch-distributed'"),
        (another_framework, "is for deepspeed; a torch runtime is needed"),
        (
            may_not_delete,
            r"may not, in namespace kubeflow: delete trainjobs \(trainer.kubeflow.org\), get "
            r"clustertrainingruntimes \(trainer.kubeflow.org\); apply deploy/base/rbac.yaml",
        ),
        (
            may_not_create,
            "may not, in namespace kubeflow: create TrainJob j; apply deploy/base/rbac",
        ),
    ],
)
def test_what_is_missing_is_told_before_anything_starts(cluster, spoil, message):
    spoil(cluster)
    with pytest.raises(UserError, match=message):
        run_here()
    assert not cluster.jobs
    assert not cluster.gone


def test_the_nodes_own_network_is_the_runtimes_to_give(cluster):
    here = api.Cluster(pauses=[0.01])
    wrong = r"host_network=true, but the pods of ClusterTrainingRuntime 'torch-distributed' .*apply"
    with pytest.raises(UserError, match=wrong):
        here.check("torch-distributed", host_network=True)
    runtime = yaml.safe_load(Path("deploy/host-network.yaml").read_text())
    cluster.runtimes[runtime["metadata"]["name"]] = runtime
    kind = here.check("torch-distributed-host-network", host_network=True)
    assert kind == "ClusterTrainingRuntime"
    assert here.check("torch-distributed") == kind


def test_an_api_that_is_away_at_the_start(cluster):
    """A TrainJob whose creation was not answered is not made twice, and nobody else's is taken."""
    here = api.Cluster(pauses=[0.01] * 4)
    cluster.reviews = False  # where the rights are not known, the calls themselves will tell
    cluster.troubles = [200, 503, 429, 500, LOST]
    assert here.check("torch-distributed") == "ClusterTrainingRuntime"
    assert not cluster.troubles
    cluster.troubles = [503, LOST, 429]
    name = os.environ["KFP_POD_NAME"]
    launcher = here.pod(name)
    assert launcher["metadata"]["name"] == name
    shared = Path(os.environ["FLAGSCALE_SHARED"])
    nodes = Nodes(1, 1, 0, NodePods())

    def manifest(request: str) -> dict:
        given = {"FLAGSCALE_REQUEST": request}
        command = [sys.executable, "-c", ""]
        return train_job("j", "TrainingRuntime", launcher, shared, nodes, command, given, {}, 30)

    cluster.troubles = [503, LOST]
    here.create(manifest("/mine"))
    assert list(cluster.jobs) == ["j"]
    with pytest.raises(UserError, match=r'cannot create TrainJob j: 409 .*"j" already exists'):
        here.create(manifest("/another"))
    cluster.troubles = [503] * 5
    with pytest.raises(UserError, match=r"cannot read pod .*: 503 the API server is being"):
        here.pod(name)


def test_outside_a_pod_and_outside_a_cluster(cluster, monkeypatch):
    monkeypatch.delenv("KFP_POD_NAME")
    with pytest.raises(UserError, match="KFP_POD_NAME is not set"):
        run_here()
    monkeypatch.delenv("KUBECONFIG")
    with pytest.raises(UserError, match=r"no cluster: .*`python -m pipelines run`"):
        run_here()


def test_the_rights_that_are_checked_are_the_ones_that_deploy_grants():
    granted = set()
    for document in yaml.safe_load_all(Path("deploy/base/rbac.yaml").read_text()):
        for rule in document.get("rules", []):
            granted |= {
                (group, resource, verb)
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
            }
    wanted = {(rule.group, rule.resource, v) for rule in RULES for v in rule.verbs}
    assert wanted <= granted


def test_the_job_of_a_retry_has_the_same_name(monkeypatch):
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    name = trainjob.job_name("distil-student", [{"lr": 1e-3}])
    assert trainjob.job_name("distil-student", [{"lr": 1e-3}]) == name
    assert trainjob.job_name("distil-student", [{"lr": 1e-4}]) != name
    monkeypatch.setenv("KFP_RUN_ID", "run-2")
    assert trainjob.job_name("distil-student", [{"lr": 1e-3}]) != name
