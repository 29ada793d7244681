import pytest
import trainjob_nodes
from trainjob_nodes import launcher_pod

from flagscale.errors import UserError
from flagscale.ranks.nodes import NodePods
from flagscale.ranks.trainjob_manifest import Nodes, checked, train_job


@pytest.mark.parametrize("claim", ["team-scratch", "kfp-shared", "argo-volume"])
def test_nodes_mount_a_claim_whatever_its_name(tmp_path, claim):
    # KFP names the volume after the claim; its own are told by their names.
    launcher = launcher_pod(tmp_path)
    (volume,) = [v for v in launcher["spec"]["volumes"] if "persistentVolumeClaim" in v]
    (mount,) = [
        mount
        for container in launcher["spec"]["containers"]
        for mount in container.get("volumeMounts", [])
        if mount["name"] == volume["name"] and container["name"] == "main"
    ]
    volume["name"] = mount["name"] = claim
    manifest = train_job(
        "distil-student-0",
        "ClusterTrainingRuntime",
        launcher,
        Nodes(2, 1, 0, NodePods()),
        ["python"],
        {},
        {},
        grace_seconds=30,
    )
    patch = manifest["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    pod = patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert claim in [one["name"] for one in pod["volumes"]]
    assert mount in pod["containers"][0]["volumeMounts"]


def test_the_trainjob_is_placed_as_its_launcher_is(tmp_path, monkeypatch):
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    pods = NodePods(cpu="192", memory="1600Gi", timeout_seconds=604800)
    manifest = train_job(
        "distil-student-0",
        "ClusterTrainingRuntime",
        launcher_pod(tmp_path),
        Nodes(4, 8, 8, pods),
        ["python", "-m", "flagscale.ranks.torchrun"],
        {"FLAGSCALE_REQUEST": "/mnt/flagscale/launches/x"},
        {"OMP_NUM_THREADS": "24", "NCCL_DEBUG": "INFO"},
        grace_seconds=30,
    )
    trainjob_nodes.refuse(manifest)
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
