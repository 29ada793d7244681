import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import trainjob_nodes
from launcher_pods import POD_OF_STEP, launcher_pod, main_of

from flagscale.errors import UserError
from flagscale.execution.trainjob.manifest import Nodes, checked, train_job
from flagscale.execution.trainjob.nodes import NodePods
from flagscale.run_values.network import Network


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What Trainer is to make of the runtime's pods."""
    patch = manifest["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    template: dict[str, Any] = patch["replicatedJobs"][0]["template"]["spec"]["template"]
    return template


def plain(launcher: dict[str, Any], shared: Path) -> dict[str, Any]:
    nodes = Nodes(2, 1, 0, NodePods())
    return train_job("j", "TrainingRuntime", launcher, shared, nodes, ["python"], {}, {}, 30)


@pytest.mark.parametrize("name", ["team-scratch", "kfp-shared", "argo-volume", "input-artifacts"])
def test_the_steps_own_volumes_are_declared_whatever_their_names(tmp_path, name):
    # KFP names a claim's volume after the claim; its own are told by who else mounts them.
    launcher = launcher_pod(tmp_path)
    (volume,) = [v for v in launcher["spec"]["volumes"] if "persistentVolumeClaim" in v]
    (mount,) = [one for one in main_of(launcher)["volumeMounts"] if one["name"] == volume["name"]]
    volume["name"] = mount["name"] = name
    pod = pod_of(plain(launcher, tmp_path))["spec"]
    assert [one["name"] for one in pod["volumes"]] == [name, "tmp", "dshm"]
    assert mount in pod["containers"][0]["volumeMounts"]


def test_what_argo_and_kfp_mount_stays_behind(tmp_path):
    """A real pod as it was: ten volumes of theirs, a secret for the logs among them."""
    launcher = json.loads(POD_OF_STEP.read_text())
    pod = pod_of(plain(launcher, Path("/mnt/flagscale/runs")))["spec"]
    assert [volume["name"] for volume in launcher["spec"]["volumes"]] == [
        "flagscale-shared",
        "tmp",
        "var-run-argo",
        "tmp-dir-argo",
        "kfp-launcher",
        *(f"{name}-scratch" for name in ("gcs", "s3", "minio")),
        *(f"dot-{name}-scratch" for name in ("local", "cache", "config")),
        "mlpipeline-minio-artifact",
    ]
    assert pod["volumes"] == [
        {"name": "flagscale-shared", "persistentVolumeClaim": {"claimName": "flagscale-shared"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    assert pod["containers"][0]["volumeMounts"] == [
        {"name": "flagscale-shared", "mountPath": "/mnt/flagscale"},
        {"name": "tmp", "mountPath": "/tmp"},
    ]


def test_a_folder_that_nodes_would_not_see_is_refused(tmp_path):
    launcher = launcher_pod(tmp_path)
    wanted = rf"FLAGSCALE_SHARED=/elsewhere: no volume .* \['{tmp_path}', '/tmp', '/dev/shm'\]"
    with pytest.raises(UserError, match=wanted):
        plain(launcher, Path("/elsewhere"))


def test_the_trainjob_is_placed_as_its_launcher_is(tmp_path, monkeypatch):
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    pods = NodePods(cpu="192", memory="1600Gi", timeout_seconds=604800)
    manifest = train_job(
        "distil-student-0",
        "ClusterTrainingRuntime",
        launcher_pod(tmp_path),
        tmp_path,
        Nodes(4, 8, 8, pods),
        ["python", "-m", "flagscale.execution.torchrun"],
        {"FLAGSCALE_REQUEST": "/mnt/flagscale/launches/x"},
        {"OMP_NUM_THREADS": "24", "NCCL_DEBUG": "INFO"},
        grace_seconds=30,
    )
    trainjob_nodes.refuse(manifest)
    name = "distillation-mxbhw-retry-system-container-impl-880255696"
    owner = {"apiVersion": "v1", "kind": "Pod", "name": name}
    uid = "0227ae10-1fb3-4880-afd7-487eaee9d633"
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
    assert trainer["image"] == "flagscale-distillation:0.1.0-cpu"
    limits = {"memory": "1600Gi", "nvidia.com/gpu": "8"}
    assert trainer["resourcesPerNode"] == {"requests": {"cpu": "192", **limits}, "limits": limits}
    uri, user, password = (
        {"name": "mlflow", "key": key, "optional": key != "tracking-uri"}
        for key in ("tracking-uri", "username", "password")
    )
    assert {one.pop("name"): one for one in trainer["env"]} == {
        "OMP_NUM_THREADS": {"value": "24"},
        "FLAGSCALE_ACCELERATOR_COUNT": {"value": "8"},
        "NCCL_DEBUG": {"value": "WARN"},
        "FLAGSCALE_SHARED": {"value": str(tmp_path)},
        "KFP_RUN_ID": {"value": "run-1"},
        "KFP_RETRY_INDEX": {"value": "0"},
        "FLAGSCALE_RUN_NAME": {"value": "tiny"},
        "MLFLOW_TRACKING_URI": {"valueFrom": {"secretKeyRef": uri}},
        "MLFLOW_TRACKING_USERNAME": {"valueFrom": {"secretKeyRef": user}},
        "MLFLOW_TRACKING_PASSWORD": {"valueFrom": {"secretKeyRef": password}},
        "FLAGSCALE_REQUEST": {"value": "/mnt/flagscale/launches/x"},
    }
    template = pod_of(manifest)
    assert template["metadata"]["labels"] == {"team": "llm", "sidecar.istio.io/inject": "false"}
    pod = template["spec"]
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert [one["key"] for one in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["terminationGracePeriodSeconds"] == 30
    assert pod["volumes"] == [
        {"name": "flagscale-shared", "persistentVolumeClaim": {"claimName": "flagscale-shared"}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
    ]
    (container,) = pod["containers"]
    assert container["securityContext"]["runAsUser"] == 1000
    assert container["volumeMounts"] == [
        {"name": "flagscale-shared", "mountPath": str(tmp_path)},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "dshm", "mountPath": "/dev/shm"},
    ]


NETWORK = Network(
    resources={"rdma/hca_shared_devices_a": 2},
    annotations={"k8s.v1.cni.cncf.io/networks": "rdma-a, rdma-b"},
    capabilities=("IPC_LOCK",),
    host_folders={"/home/kubernetes/bin/gib": "/mnt/gib"},
    env={"NCCL_IB_HCA": "mlx5", "OMP_NUM_THREADS": "4", "NCCL_DEBUG": "INFO"},
)


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_a_networks_needs_are_those_of_the_nodes_alone(tmp_path, version):
    launcher = launcher_pod(tmp_path)
    before = json.dumps(launcher)
    nodes = Nodes(2, 8, 8, NodePods(network=NETWORK, annotations={"example.com/a": "b"}))
    given: dict[str, str] = {}
    kind, command = "TrainingRuntime", ["python"]
    defaults = {"OMP_NUM_THREADS": "24"}
    manifest = train_job("j", kind, launcher, tmp_path, nodes, command, given, defaults, 30)
    trainjob_nodes.refuse(manifest)
    assert json.dumps(launcher) == before
    trainer, template = manifest["spec"]["trainer"], pod_of(manifest)
    limits = {"memory": "16Gi", "nvidia.com/gpu": "8", "rdma/hca_shared_devices_a": "2"}
    assert trainer["resourcesPerNode"] == {"requests": {"cpu": "2", **limits}, "limits": limits}
    env = {one["name"]: one.get("value") for one in trainer["env"]}
    assert (env["NCCL_IB_HCA"], env["OMP_NUM_THREADS"]) == ("mlx5", "4")
    assert env["NCCL_DEBUG"] == "WARN"  # the launcher's, of all steps
    assert template["metadata"]["annotations"] == {
        "example.com/a": "b",
        "k8s.v1.cni.cncf.io/networks": "rdma-a, rdma-b",
        "sidecar.istio.io/inject": "false",
    }
    (container,) = template["spec"]["containers"]
    context = container["securityContext"]
    assert context == {
        **main_of(launcher)["securityContext"],
        "capabilities": {**context["capabilities"], "add": ["IPC_LOCK"]},
    }
    folder = {"name": "host-folder-0", "mountPath": "/mnt/gib", "readOnly": True}
    assert container["volumeMounts"][-1] == folder
    # As Trainer makes it: the runtime's container gets the trainer's fields.
    runtimes = {"image": trainer["image"], "env": trainer["env"]}
    container |= runtimes | {"resources": trainer["resourcesPerNode"]}
    metadata = template["metadata"] | {"name": "node-0"}
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}
    kubernetes_validate.validate(pod, version, strict=True)


def test_what_trainers_models_do_not_know_is_refused(tmp_path):
    manifest = plain(launcher_pod(tmp_path), tmp_path)
    assert checked(manifest) == manifest
    manifest["spec"]["trainer"]["gpus"] = 8
    with pytest.raises(UserError, match=r"does not know: TrainJob.spec.trainer.gpus"):
        checked(manifest)
    manifest["spec"]["trainer"] = {"numNodes": "two"}
    with pytest.raises(UserError, match=r"TrainJob: (?s:.*)numNodes"):
        checked(manifest)
