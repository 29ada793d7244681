"""The tiny pipeline in containers, beside the same run whose steps are processes."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from engine import BASE, ROOT, Engine
from runs import Containers, Runs, Tracking

pytestmark = pytest.mark.timeout(1800)  # the first test waits for the images

STEPS = (
    "prepare-data",
    "prepare-teacher",
    "convert-student",
    "distil-student",
    "evaluate",
    "export-student",
)
ARTIFACTS = (
    "dataset",
    "teacher",
    "student",
    "distilled_student",
    "evaluation",
    "exported_student",
)
# Two runs of the same code differ in these, in containers or not: speeds, and the random name
# that torch gives each save. The digests of parents and
# ancestors follow from them.
SPEEDS = re.compile("tokens.per.second")
OF_ITS_TIME = {"weights/.metadata", "training.jsonl", "report.html", "report.json"}


def without_speed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_speed(v) for k, v in value.items() if not SPEEDS.search(k)}
    return [without_speed(v) for v in value] if isinstance(value, list) else value


def manifest(folder: Path) -> dict[str, Any]:
    found = without_speed(json.loads((folder / "manifest.json").read_text()))
    found["files"] = {k: v for k, v in found["files"].items() if k not in OF_ITS_TIME}
    found["parents"] = sorted(found["parents"])
    found["ancestors"] = sorted(one["kind"] for one in found["ancestors"].values())
    assert found.pop("peak_memory")["host"]  # of the process, which is another
    found.pop("energy")  # ditto
    return found


def training_log(folder: Path) -> list[Any]:
    return [without_speed(json.loads(line)) for line in (folder / "training.jsonl").open()]


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifacts_equal_those_of_processes(
    contained: Containers, reference: Runs, name: str
) -> None:
    """Weights, data and export byte for byte, after two interruptions; every fact the same."""
    ours = manifest(contained.output(name))
    assert ours == manifest(reference.output(name))
    assert ours["files"]


def test_losses_and_measurements_equal_those_of_processes(
    contained: Containers, reference: Runs
) -> None:
    ours, theirs = (runs.output("distilled_student") for runs in (contained, reference))
    assert len(training_log(ours)) == 200
    assert training_log(ours) == training_log(theirs)
    ours, theirs = (runs.output("evaluation") for runs in (contained, reference))
    assert (ours / "metrics.json").read_bytes() == (theirs / "metrics.json").read_bytes()


def test_a_step_that_is_killed_fails_the_run(contained: Containers) -> None:
    """KFP takes a container that is gone for one that ended well."""
    assert contained.exits[0] == 1
    last = contained.outputs[0].splitlines()[-1]
    assert last == (
        "error: distil-student failed: it ended without a word: killed, perhaps for want of memory"
    )


def test_a_run_that_is_stopped_goes_on_in_a_new_container(contained: Containers) -> None:
    assert contained.exits[1] == 143
    assert "the same command goes on from there" in contained.outputs[1]
    assert "resuming after step" in contained.outputs[1]
    assert contained.exits[2] == 0, contained.outputs[2]
    assert "resuming after step" in contained.outputs[2]
    for name in STEPS[:3]:
        assert f"{name} reused from cache" in contained.outputs[2]


def test_no_container_is_left(contained: Containers) -> None:
    assert contained.left == [0, 0, 0]


def test_a_step_is_not_root_and_cannot_become_it(contained: Containers) -> None:
    assert contained.user == (1000, 1000)
    status = dict(line.split(":\t", 1) for line in contained.status.splitlines())
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
        "0" * 16
    }
    assert status["NoNewPrivs"] == "1"


def test_what_is_not_the_steps_is_read_only_even_for_root(contained: Containers) -> None:
    assert len(contained.attempts_to_write) == 4
    for path, (exit_code, output) in contained.attempts_to_write.items():
        assert exit_code != 0, path
        assert "Read-only file system" in output, path


def test_what_a_step_writes_belongs_to_its_user(contained: Containers) -> None:
    written = [p for name in ARTIFACTS for p in contained.output(name).rglob("*")]
    assert written
    assert {path.stat().st_uid for path in written} == {1000}


@pytest.fixture
def client(
    contained: Containers, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> mlflow.MlflowClient:
    for name, value in contained.environment.items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    return mlflow.MlflowClient(tracking.uri)


def test_mlflow_on_postgresql_has_every_run(client: mlflow.MlflowClient) -> None:
    experiment = client.get_experiment_by_name("flagscale-distillation")
    assert experiment
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.status for r in parents] == ["FAILED", "KILLED", "FINISHED"]
    children = {
        r.info.run_name: r.info.status
        for r in runs
        if r.data.tags.get("mlflow.parentRunId") == parents[-1].info.run_id
    }
    assert children == dict.fromkeys(STEPS, "FINISHED")
    assert not [r for r in runs if r.info.status == "RUNNING"]
    assert client.search_model_versions("name='tiny'")


def test_mlflow_refuses_who_brings_no_password(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(mlflow.MlflowException, match="401"):
        mlflow.MlflowClient(tracking.uri).search_experiments()


def test_no_secret_is_written_anywhere(
    contained: Containers,
    tracking: Tracking,
    engine: Engine,
    images: dict[str, str],
    planted: dict[str, str],
    tmp_path: Path,
) -> None:
    """Runs with their logs, manifests and checkpoints; MLflow's store; compiled YAML; images."""
    compiled = tmp_path / "distillation.yaml"
    command = [sys.executable, "-m", "pipelines", "compile", "recipes/tiny.yaml"]
    subprocess.run(
        [*command, "--platform", "gke-h100", "-o", compiled],
        cwd=ROOT,
        env=contained.environment,
        check=True,
    )
    texts = {
        "what the runs printed": "".join(contained.outputs).encode(),
        "the database": tracking.database.dump(),
        "the images": engine.podman("inspect", *images.values()).encode(),
        "the compiled pipeline": compiled.read_bytes(),
    }
    for folder in (contained.folder, tracking.artifacts):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                texts[str(path)] = path.read_bytes()
    assert len(texts) > 100
    assert b"distil-student" in texts["the database"]
    password = planted["MLFLOW_TRACKING_PASSWORD"]
    needles = [*planted.values(), base64.b64encode(f"distil:{password}".encode()).decode()]
    for name, text in texts.items():
        for needle in needles:
            assert needle.encode() not in text, name


def refusal(engine: Engine, image: str, folder: Path) -> str:
    command = [sys.executable, "-m", "pipelines", "run", "recipes/tiny.yaml", "--image", image]
    result = subprocess.run(
        [*command, "--runs", folder],
        cwd=ROOT,
        env=engine.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    return result.stderr.splitlines()[-1]


def test_an_image_of_other_code_is_refused(
    engine: Engine, images: dict[str, str], tmp_path: Path
) -> None:
    last = refusal(engine, BASE, tmp_path)
    assert f"--image {BASE}: it holds no code of this project" in last
    assert "make images" in last
    last = refusal(engine, "nowhere/nothing:1", tmp_path)
    assert "--image nowhere/nothing:1: no such image" in last


def test_the_image_is_small_and_brings_no_tools(engine: Engine, images: dict[str, str]) -> None:
    script = (
        "for tool in gcc g++ cc make pip pip3 ld; do command -v $tool && exit 1; done; "
        "python -m pip --version 2>/dev/null && exit 1; "
        "ls /opt/venv/lib/python3*/site-packages | grep -E '^(nvidia_c|triton|pytest|mypy)' "
        "&& exit 1; "
        "python -c 'import flagscale.train.loop, kubeflow.trainer, s3fs, torch; "
        "assert torch.version.cuda is None'; id -u; pwd"
    )
    options = ["--rm", "--read-only", "--tmpfs=/tmp", "--user=12345:12345", "--network=none"]
    printed = engine.podman("run", *options, images["cpu"], "sh", "-c", script)
    assert printed.split() == ["12345", "/tmp"]
    for kind, most in (("cpu", 2.2e9), ("mlflow", 1.2e9)):
        (size,) = engine.podman("inspect", "--format={{.Size}}", images[kind]).split()
        assert int(size) < most, kind
