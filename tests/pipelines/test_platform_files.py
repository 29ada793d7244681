"""What a platform file may say, and what it is told where it is wrong."""

from pathlib import Path

import pytest

from flagscale.errors import UserError
from pipelines.platform import Images, load_platform

NETWORK = "{{shared: {{claim: v}}, trainer: {{network: {}}}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: {training: {memroy: 8Gi}}", "did you mean 'memory'?"),
        ("steps: {training: {memory: lots}}", "steps.training.memory='lots'"),
        ("steps: {data: {accelerator_count: 1}}", "data.accelerator_count=1"),
        ("shared: {}", "needs one of claim, create, url"),
        ("shared: {claim: a, url: s3://b}", "needs one of claim, create, url"),
        ("shared: {url: ftp://b}", "must start with s3://"),
        ("secrets: [{name: a, env: {}}]", "secrets.0.env"),
        ("env: {HF_TOKEN: hf_planted}", "env: HF_TOKEN looks like a secret"),
        ("env: {PROXY: 'http://me:planted@proxy'}", "env: PROXY looks like a secret"),
        ("shared: {url: 's3://key:planted@b'}", "url=s3://***@b: holds credentials"),
        ("run_as_user: 0", "run_as_user=0"),
        ("steps: {models: {tolerations: [{operator: Exists, value: x}]}}", "takes no value"),
        ("a: [", "not readable YAML"),
        ("", "must be a mapping of sections, not None"),
        ("mlflow: {secret: a}\nmlflow: {secret: b}", "mlflow is given twice, first in line 1"),
        # What would be found out only by a pod that cannot start, or never.
        ("shared: {claim: my.claim}", "shared.claim='my.claim'"),
        ("shared: {claim: tmp}", "every pod has one of this name"),
        ("shared: {claim: a, mount_path: /tmp}", "shared.mount_path='/tmp'"),
        ("shared: {claim: a, mount_path: /tmp/flagscale}", "something at /tmp already"),
        ("shared: {claim: a, mount_path: /opt/venv}", "something at /opt already"),
        ("shared: {claim: a, mount_path: /usr}", "something at /usr already"),
        ("shared: {claim: a, mount_path: /var}", "something at /var/run already"),
        ("shared: {claim: a, mount_path: /var/run/secrets}", "something at /var/run already"),
        ("shared: {claim: a, mount_path: //tmp}", "without //, . and .."),
        ("shared: {claim: a, mount_path: /mnt/../tmp}", "without //, . and .."),
        ("shared: {claim: a, mount_path: /mnt/./a}", "without //, . and .."),
        ("shared: {url: 's3://'}", "url='s3://' must start with s3://, gs:// or az://, and name"),
        ("shared: {url: 's3:///a'}", "and name a bucket"),
        ("shared: {url: 's3://bucket', mount_path: /x}", "nothing is mounted"),
        ("shared: {create: {size: 1Ti}}", "shared.create.storage_class: required"),
        ("shared: {create: {size: 1Ti, storage_class: a, access_modes: []}}", "access_modes=[]"),
        ("shared: {create: {size: 1K, storage_class: a}}", "shared.create.size='1K'"),
        ("shared: {create: {size: 1Mi, storage_class: a}}", "is 1048576 bytes; must be 64Mi"),
        ("steps: {data: {memory: '0'}}", "steps.data.memory='0'"),
        ("steps: {data: {memory: 64}}", "is 64 bytes; must be 64Mi or more"),
        ("steps: {data: {memory: 010}}", "is 8 bytes; must be 64Mi or more"),
        ("steps: {data: {memory: 16M}}", "is 16000000 bytes; must be 64Mi or more"),
        ("steps: {data: {shared_memory: 1}}", "is 1 bytes; must be 64Mi or more"),
        ("steps: {data: {cpu: true}}", "steps.data.cpu=True"),
        ("steps: {data: {cpu: 0}}", "must be more than 0"),
        ("steps: {data: {cpu: 0m}}", "must be more than 0"),
        ("steps: {data: {cpu: 0.0}}", "must be more than 0"),
        (
            "steps: {training: {timeout_seconds: 604801}}",
            "retries.max_duration=604800s would end a pod before its timeout_seconds=604801",
        ),
        (
            "{trainer: {active_deadline_seconds: 61}, steps: {training: {timeout_seconds: 60}}}",
            "trainer.active_deadline_seconds=61 is more than steps.training.timeout_seconds=60",
        ),
        (
            "{trainer: {active_deadline_seconds: 61}, runs: {active_deadline_seconds: 60}}",
            "trainer.active_deadline_seconds=61 is more than runs.active_deadline_seconds=60",
        ),
        ("runs: {ttl_seconds_after_finished: 0}", "runs.ttl_seconds_after_finished=0"),
        ("runs: {active_deadline_seconds: 2147483648}", "runs.active_deadline_seconds=2147483648"),
        ("steps: {data: {retries: {max_duration: 0s}}}", "leaves no time for count=2"),
        (
            "steps: {models: {memory: 1Gi, shared_memory: 1025Mi}}",
            "shared_memory=1025Mi is part of memory=1Gi",
        ),
        ("images: {gpu: ''}", "images.gpu=''"),
        ("images: {gpu: https://registry/a:1}", "must be like registry.example.com/team/name:tag"),
        ("images: {gpu: 'https://me:planted@registry/a'}", "images.gpu='https://***@registry/a'"),
        ("images: {gpu: Registry.example.com/ML/Foo:BAR}", "in lower case but for the tag"),
        ("images: {gpu: 'a:1:2'}", "images.gpu='a:1:2'"),
        ("images: {gpu: 'a@sha256:abc'}", "images.gpu='a@sha256:abc'"),
        ("mlflow: {secret: a..b}", "mlflow.secret='a..b'"),
        ("secrets: [{name: a, env: {my token: A}}]", "secrets.0.env.my token"),
        ("run_as_user: 2147483648", "run_as_user=2147483648"),
        ("steps: {data: {tolerations: [{key: a b}]}}", "tolerations.0.key='a b'"),
        ("steps: {data: {tolerations: [{key: a, value: b c}]}}", "tolerations.0.value='b c'"),
        ("steps: {training: {accelerator_type: ''}}", "accelerator_type=''"),
        ("steps: {data: {node_selector: {pool: a b}}}", "node_selector.pool='a b'"),
        ("steps: {data: {labels: {a b: c}}}", "steps.data.labels.a b"),
        (f"steps: {{data: {{queue: {'q' * 64}}}}}", "at most 63 characters"),
        (
            "steps: {data: {queue: a, labels: {kueue.x-k8s.io/queue-name: b}}}",
            "queue or priority gives it",
        ),
        (
            "steps: {data: {tolerations: [{key: a, tolerationSeconds: 5}]}}",
            "only for effect=NoExecute",
        ),
        # Of two values of a variable a pod takes the last.
        ("env: {FLAGSCALE_SHARED: /x}", "FLAGSCALE_SHARED is set by env and by the pipeline"),
        ("env: {FLAGSCALE_SECRET_VARIABLES: A}", "by env and by the pipeline"),
        ("env: {MLFLOW_TRACKING_URI: 'http://x'}", "by env and by mlflow.secret"),
        ("env: {FLAGSCALE_MLFLOW_TRACKING_URI: 'http://x'}", "by env and by mlflow.secret"),
        (
            "secrets: [{name: a, env: {k: HF_TOKEN}}, {name: b, env: {k: HF_TOKEN}}]",
            "HF_TOKEN is set by secret b and by secret a",
        ),
        ("{secrets: [{name: a, env: {k: A}}], env: {A: '1'}}", "A is set by env and by secret a"),
        # A fast network.
        ("steps: {training: {annotations: {a b: c}}}", "steps.training.annotations.a b"),
        (NETWORK.format("{resources: {hca: 1}}"), "trainer.network.resources.hca"),
        (NETWORK.format("{resources: {rdma/hca: 0}}"), "trainer.network.resources.rdma/hca=0"),
        (NETWORK.format("{resources: {nvidia.com/gpu: 8}}"), "accelerator_count says how many"),
        (NETWORK.format("{capabilities: [ipc_lock]}"), "capabilities.0='ipc_lock'"),
        (
            NETWORK.format("{capabilities: [CAP_IPC_LOCK]}"),
            "CAP_IPC_LOCK is IPC_LOCK in Kubernetes",
        ),
        (
            NETWORK.format("{annotations: {sidecar.istio.io/inject: 'true'}}"),
            "the launcher sets it",
        ),
        (NETWORK.format("{host_folders: {a: /b}}"), "host_folders.a"),
        (NETWORK.format("{host_folders: {/a: /usr/lib}}"), "something at /usr already"),
        (NETWORK.format("{host_folders: {/a: /c, /b: /c}}"), "two of them at one path"),
        (NETWORK.format("{env: {HF_TOKEN: hf_planted}}"), "HF_TOKEN looks like a secret"),
        (
            NETWORK.format("{env: {NCCL_DEBUG: INFO}}}, env: {NCCL_DEBUG: WARN"),
            "NCCL_DEBUG is set by trainer.network.env and by env",
        ),
        (
            NETWORK.format("{annotations: {a: b}}}, steps: {training: {annotations: {a: c}}"),
            "annotation a is set by trainer.network and by steps.training",
        ),
        (
            "trainer: {network: {host_network: true}}",
            "trainer.network is for TrainJobs, which need",
        ),
    ],
)
def test_wrong_platform_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_platform(path)
    assert message in str(error.value)
    assert "planted" not in str(error.value)


def test_quantities_may_be_numbers_as_in_kubernetes(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("steps: {data: {cpu: 4, memory: 8589934592}, models: {cpu: 0.5}}")
    steps = load_platform(path).steps
    assert (steps.data.cpu, steps.data.memory, steps.models.cpu) == ("4", "8589934592", "0.5")


@pytest.mark.parametrize(
    "text",
    [
        "shared: {claim: a, mount_path: /mnt/a.b/c}",
        "shared: {claim: a, mount_path: /data}",
        "shared: {claim: a, mount_path: /tmpfs}",
        "shared: {url: 's3://bucket'}",
        "steps: {data: {memory: 64Mi, shared_memory: 64Mi, cpu: 1m}}",
        "steps: {training: {timeout_seconds: 604801, retries: {count: 0}}}",
        "steps: {training: {retries: {count: 0, max_duration: 0s}}}",
        "steps: {training: {timeout_seconds: 60, retries: {max_duration: 60s}}}",
        "steps: {data: {tolerations: [{key: a.b/c, value: ''}, {operator: Exists}]}}",
        "secrets: [{name: a.b-c, env: {_my.Key-1: A}}]",
        "runs: {active_deadline_seconds: 2147483647, ttl_seconds_after_finished: 1}",
        "run_as_user: 2147483647",
    ],
)
def test_platform_files_at_the_border_of_what_is_right(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    load_platform(path)


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "team/a_b__c-d.e:Tag_1.0",
        "localhost:5000/a",
        "[fd00::1]:5000/a",
        "nvcr.io/nvidia/pytorch:25.12-py3",
        f"registry.example.com/team/a:1@sha256:{'0f' * 32}",
    ],
)
def test_images_that_a_container_runtime_takes(name: str) -> None:
    assert Images(cpu=name).cpu == name


def test_without_a_secret_for_mlflow_its_address_may_be_a_variable(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("{mlflow: {secret: null}, env: {MLFLOW_TRACKING_URI: 'http://mlflow:5000'}}")
    assert load_platform(path).env == {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}


def test_an_unknown_platform_names_the_known() -> None:
    with pytest.raises(UserError, match="known names: cpu-only, gke-h100, on-prem-a100, "):
        load_platform("gke-h200")
