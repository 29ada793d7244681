"""The launcher against a cluster whose nodes are real processes of this machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_server
import pytest
import yaml
from kubernetes_server import NAMESPACE, Cluster

from flagscale.errors import UserError
from flagscale.recipe import ParallelismRecipe
from flagscale.steps import cluster as cluster_module
from flagscale.steps import trainjob, trainjob_state
from flagscale.steps.nodes import NodePods, processes_per_node, shared_folder
from flagscale.steps.trainjob_manifest import Nodes, checked, train_job

SECRET = "planted-5f1c"
RANKS = """
import logging, os, signal, sys, time
from flagscale.errors import UserError

def run(what):
    rank = os.environ["RANK"]
    for number in range(20):
        logging.getLogger(__name__).info("line %d of rank %s", number, rank)
    if what == "environment":
        names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "KFP_RUN_ID", "NCCL_DEBUG",
                 "MLFLOW_EXPERIMENT_NAME", "KFP_POD_NAME", "FLAGSCALE_SHARED")
        found = {name: os.environ.get(name) for name in names}
        return {**found, "secret": os.environ["MLFLOW_TRACKING_PASSWORD"][::-1]}
    if what == "error" and rank == "1":
        raise UserError("the second node says what is wrong")
    if what == "kill" and rank == "1":
        os.kill(os.getpid(), 9)
    time.sleep(60)
"""
LAUNCHER = """
import json, sys
from pathlib import Path
from flagscale.steps.nodes import NodePods
from flagscale.steps.step_process import step_process
from flagscale.steps.trainjob import job_name, run_on_nodes
from flagscale.steps.trainjob_manifest import Nodes

with step_process("launcher"):
    nodes = Nodes(2, 1, 0, NodePods(cpu="3"))
    request = {"what": sys.argv[1]}
    name = job_name("distil-student", request)
    result = run_on_nodes("ranks", "ranks:run", request, nodes, Path(sys.argv[2]), name)
    Path(sys.argv[2], "told.json").write_text(json.dumps(result))
    assert "torch" not in sys.modules
"""


def launcher_pod(shared: Path) -> dict:
    """As Argo makes it for a step of KFP: the step's container beside their own."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "distillation-x-launcher",
            "namespace": NAMESPACE,
            "uid": "7f5d0000-0000-4000-8000-000000000001",
            "labels": {
                "team": "llm",
                "kueue.x-k8s.io/queue-name": "distillation",
                "kueue.x-k8s.io/priority-class": "training",
                "kueue.x-k8s.io/managed": "true",
                "pipeline/runid": "run-1",
                "pipelines.kubeflow.org/v2_component": "true",
                "workflows.argoproj.io/workflow": "distillation-x",
            },
        },
        "spec": {
            "nodeSelector": {"pool": "h100"},
            "tolerations": [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
                {"key": "node.kubernetes.io/not-ready", "operator": "Exists"},
            ],
            "imagePullSecrets": [{"name": "registry"}],
            "securityContext": {"fsGroup": 1000},
            "volumes": [
                {"name": "flagscale-shared", "persistentVolumeClaim": {"claimName": "shared"}},
                {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "kfp-launcher", "emptyDir": {}},
                {"name": "dot-cache-scratch", "emptyDir": {}},
                {"name": "var-run-argo", "emptyDir": {}},
                {"name": "kube-api-access-x", "projected": {"sources": []}},
            ],
            "containers": [
                {"name": "wait", "image": "argoexec", "env": [{"name": "ARGO_X", "value": "1"}]},
                {
                    "name": "main",
                    "image": "registry.example/flagscale@sha256:0",
                    "securityContext": {"runAsUser": 1000, "runAsNonRoot": True},
                    "env": [
                        {"name": "FLAGSCALE_SHARED", "value": str(shared)},
                        {"name": "NCCL_DEBUG", "value": "WARN"},
                        {
                            "name": "KFP_RUN_ID",
                            "valueFrom": {
                                "fieldRef": {"fieldPath": "metadata.labels['pipeline/runid']"}
                            },
                        },
                        {
                            "name": "KFP_POD_NAME",
                            "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}},
                        },
                        {
                            "name": "MLFLOW_TRACKING_PASSWORD",
                            "valueFrom": {
                                "secretKeyRef": {
                                    "name": "mlflow",
                                    "key": "password",
                                    "optional": True,
                                }
                            },
                        },
                        {"name": "ARGO_CONTAINER_NAME", "value": "main"},
                    ],
                    "volumeMounts": [
                        {"name": "flagscale-shared", "mountPath": "/mnt/flagscale"},
                        {"name": "dshm", "mountPath": "/dev/shm"},
                        {"name": "tmp", "mountPath": "/tmp"},
                        {"name": "kfp-launcher", "mountPath": "/kfp-launcher"},
                        {"name": "dot-cache-scratch", "mountPath": "/.cache"},
                        {"name": "kube-api-access-x", "mountPath": "/var/run/secrets/x"},
                    ],
                },
            ],
        },
    }


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster with a launcher's pod, whose environment this process has."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "ranks.py").write_text(RANKS)
    found = Cluster(tmp_path)
    pod = launcher_pod(shared)
    found.pods[pod["metadata"]["name"]] = pod
    found.secrets["mlflow"] = {"password": SECRET}
    for name, value in {
        "KUBECONFIG": str(found.kubeconfig),
        "KFP_POD_NAME": pod["metadata"]["name"],
        "KFP_RUN_ID": "run-1",
        "FLAGSCALE_SHARED": str(shared),
        "MLFLOW_EXPERIMENT_NAME": "distillation",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "PYTHONPATH": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


def start(what: str) -> subprocess.Popen:
    command = [sys.executable, "-c", LAUNCHER, what, os.environ["FLAGSCALE_SHARED"]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def launch(what: str) -> tuple[int, str]:
    process = start(what)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def test_the_first_ranks_result_and_log_come_back(cluster, tmp_path):
    """Though the log's stream breaks; what the pod has, the ranks have, secrets as references."""
    cluster.break_log_after = 7
    code, output = launch("environment")
    assert code == 0, output
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
    lines = [line.split(" ", 1)[1] for line in output.splitlines() if "of rank" in line]
    assert lines == [f"line {number} of rank 0" for number in range(20)]
    assert "2 nodes x 1 processes" in output
    time.sleep(0.5)
    assert not cluster.jobs
    (job,) = cluster.gone
    assert SECRET not in json.dumps(job.manifest)
    assert not list((tmp_path / "shared/launches").iterdir())


def test_any_nodes_error_becomes_the_steps(cluster):
    """Though Kubernetes starts the failed pod anew, and node 0 would wait for a minute."""
    begin = time.monotonic()
    code, output = launch("error")
    assert code == 1
    assert output.splitlines()[-1].endswith("launcher: the second node says what is wrong")
    assert time.monotonic() - begin < 45
    assert ("delete", f"{kubernetes_server.JOBS}/{name_of(cluster)}") in cluster.requests


def test_a_killed_rank_is_told_of(cluster):
    cluster.backoff_limit = 0
    code, output = launch("kill")
    assert code == 1
    assert "node-0-1" in output.splitlines()[-1], output
    assert "exit code 1" in output.splitlines()[-1], output


def name_of(cluster: Cluster) -> str:
    return next(iter([*cluster.jobs, *(job.name for job in cluster.gone)]))


def test_a_launcher_that_waits_for_nodes_says_so_and_can_be_stopped(cluster, tmp_path):
    cluster.schedulable = False
    process = start("environment")
    while not cluster.jobs:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.terminate()
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 143, output
    assert "interrupted" in output
    time.sleep(0.3)
    assert not cluster.jobs


def test_what_is_waited_for(tmp_path):
    job = kubernetes_server.Job(
        {"metadata": {"name": "j"}, "spec": {"trainer": {"numNodes": 2}}, "status": {}}
    )
    pods = [kubernetes_server.pending(job, index) for index in range(2)]
    assert trainjob_state.waiting(job.manifest, pods, 2) == (
        "pod j-node-0-0-x: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    )
    suspended = {"type": "Suspended", "status": "True", "message": "Trainjob is suspended"}
    queued = {**job.manifest, "status": {"conditions": [suspended]}}
    assert "queued by Kueue: Trainjob is suspended" in str(trainjob_state.waiting(queued, [], 2))
    for pod in pods:
        pod["status"] = {"phase": "Running"}
    assert trainjob_state.waiting(job.manifest, pods, 2) is None
    assert trainjob_state.dead_pod(pods) is None
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pods[1]["status"]["containerStatuses"] = [
        {"name": "node", "state": {"running": {}}, "lastState": ended}
    ]
    assert trainjob_state.dead_pod(pods) == "pod j-node-0-1-x ended: OOMKilled, exit code 137"
    pods[0]["status"] = {"phase": "Failed", "reason": "Evicted", "message": "low on memory"}
    assert trainjob_state.dead_pod(pods) == "pod j-node-0-0-x failed: Evicted: low on memory"
    assert not trainjob_state.all_ended(pods)
    assert trainjob_state.all_ended(pods[:1])


def run_here() -> None:
    nodes = Nodes(2, 1, 0, NodePods())
    shared = Path(os.environ["FLAGSCALE_SHARED"])
    trainjob.run_on_nodes("ranks", "ranks:run", {"what": "count"}, nodes, shared, "j")


def no_trainer(cluster: Cluster) -> None:
    cluster.has_trainer = False


def no_runtime(cluster: Cluster) -> None:
    cluster.runtimes = {}


def another_framework(cluster: Cluster) -> None:
    text = json.dumps(kubernetes_server.RUNTIME).replace(': "torch"}}', ': "deepspeed"}}')
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
            r"may not, in namespace team: delete trainjobs \(trainer.kubeflow.org\), get "
            r"clustertrainingruntimes \(trainer.kubeflow.org\); apply deploy/base/rbac.yaml",
        ),
        (may_not_create, "may not, in namespace team: create TrainJob j; apply deploy/base/rbac"),
    ],
)
def test_what_is_missing_is_told_before_anything_starts(cluster, spoil, message):
    spoil(cluster)
    with pytest.raises(UserError, match=message):
        run_here()
    assert not cluster.jobs
    assert not cluster.gone


def test_outside_a_pod_and_outside_a_cluster(cluster, monkeypatch):
    monkeypatch.delenv("KFP_POD_NAME")
    with pytest.raises(UserError, match="KFP_POD_NAME is not set"):
        run_here()
    monkeypatch.delenv("KUBECONFIG")
    with pytest.raises(UserError, match=r"no cluster: .*resources.nodes=1"):
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
    wanted = {(rule.group, rule.resource, v) for rule in cluster_module.RULES for v in rule.verbs}
    assert wanted <= granted


def test_the_trainjob_is_placed_as_its_launcher_is(tmp_path, monkeypatch):
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    pods = NodePods(cpu="192", memory="1600Gi", timeout_seconds=604800)
    manifest = train_job(
        "distil-student-0",
        "ClusterTrainingRuntime",
        launcher_pod(tmp_path),
        Nodes(4, 8, 8, pods),
        ["python", "-m", "flagscale.steps.torchrun"],
        {"FLAGSCALE_REQUEST": "/mnt/flagscale/launches/x"},
        {"OMP_NUM_THREADS": "24", "NCCL_DEBUG": "INFO"},
        grace_seconds=30,
    )
    kubernetes_server.refuse(manifest)
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "distillation-x-launcher"}
    uid = "7f5d0000-0000-4000-8000-000000000001"
    assert manifest["metadata"]["ownerReferences"] == [{**owner, "uid": uid}]
    assert manifest["metadata"]["labels"] == {
        "app.kubernetes.io/managed-by": "flagscale-distillation",
        "kueue.x-k8s.io/queue-name": "distillation",
        "kueue.x-k8s.io/priority-class": "training",
    }
    spec = manifest["spec"]
    assert spec["activeDeadlineSeconds"] == 604800
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["image"] == "registry.example/flagscale@sha256:0"
    limits = {"memory": "1600Gi", "nvidia.com/gpu": "8"}
    assert trainer["resourcesPerNode"] == {"requests": {"cpu": "192", **limits}, "limits": limits}
    key = {"name": "mlflow", "key": "password", "optional": True}
    assert {one.pop("name"): one for one in trainer["env"]} == {
        "OMP_NUM_THREADS": {"value": "24"},
        "NCCL_DEBUG": {"value": "WARN"},
        "FLAGSCALE_SHARED": {"value": str(tmp_path)},
        "KFP_RUN_ID": {"value": "run-1"},
        "MLFLOW_TRACKING_PASSWORD": {"valueFrom": {"secretKeyRef": key}},
        "FLAGSCALE_REQUEST": {"value": "/mnt/flagscale/launches/x"},
    }
    patch = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    template = patch["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["labels"] == {"team": "llm", "sidecar.istio.io/inject": "false"}
    pod = template["spec"]
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert [one["key"] for one in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["securityContext"] == {"fsGroup": 1000}
    assert pod["terminationGracePeriodSeconds"] == 30
    assert pod["volumes"] == [
        {"name": "flagscale-shared", "persistentVolumeClaim": {"claimName": "shared"}},
        {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    (container,) = pod["containers"]
    assert container["securityContext"] == {"runAsUser": 1000, "runAsNonRoot": True}
    assert [one["name"] for one in container["volumeMounts"]] == [
        "flagscale-shared",
        "dshm",
        "tmp",
    ]


def test_what_trainers_models_do_not_know_is_refused(tmp_path):
    pod = launcher_pod(tmp_path)
    nodes = Nodes(2, 1, 0, NodePods())
    manifest = train_job("j", "TrainingRuntime", pod, nodes, ["python"], {}, {}, 30)
    assert checked(manifest) == manifest
    manifest["spec"]["trainer"]["gpus"] = 8
    with pytest.raises(UserError, match=r"does not know: TrainJob.spec.trainer.gpus"):
        checked(manifest)
    manifest["spec"]["trainer"] = {"numNodes": "two"}
    with pytest.raises(UserError, match=r"TrainJob: (?s:.*)numNodes"):
        checked(manifest)


def test_ranks_on_a_node():
    one = ParallelismRecipe()
    assert processes_per_node(one, nodes=2, accelerator_count=8) == 8
    assert processes_per_node(one, nodes=2, accelerator_count=0) == 1
    four = ParallelismRecipe(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert processes_per_node(four, nodes=2, accelerator_count=0) == 2
    assert processes_per_node(four, nodes=3, accelerator_count=0) == 4
    assert processes_per_node(ParallelismRecipe(processes=3), nodes=2, accelerator_count=0) == 3
    with pytest.raises(UserError, match=r"processes=4 on each node, but a node has 2 accelerators"):
        processes_per_node(ParallelismRecipe(processes=4), nodes=2, accelerator_count=2)


def test_nodes_need_a_folder_that_all_of_them_see(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_SHARED", "s3://bucket/x")
    with pytest.raises(UserError, match=r"FLAGSCALE_SHARED=s3://bucket/x: several nodes need a"):
        shared_folder({})
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no such folder"):
        shared_folder({})
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path))
    assert shared_folder({"checkpoints": tmp_path / "checkpoints"}) == tmp_path
    with pytest.raises(UserError, match=r"checkpoints=/tmp/flagscale must lie under"):
        shared_folder({"checkpoints": Path("/tmp/flagscale")})


def test_the_job_of_a_retry_has_the_same_name(monkeypatch):
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    name = trainjob.job_name("distil-student", [{"lr": 1e-3}])
    assert trainjob.job_name("distil-student", [{"lr": 1e-3}]) == name
    assert trainjob.job_name("distil-student", [{"lr": 1e-4}]) != name
    monkeypatch.setenv("KFP_RUN_ID", "run-2")
    assert trainjob.job_name("distil-student", [{"lr": 1e-3}]) != name
