"""Steps in pods that share a volume or a bucket, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagscale.artifacts import open_artifact
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.shared import fetch, read_pointer, shared_place, write_pointer
from flagscale.shared.store import ObjectStore

POD = Path(__file__).with_name("pod.py")
PATIENCE = 300  # seconds: far more than is needed, on a machine with much else to do
TRAINING = TrainingRecipe(
    train_iters=80,  # so many that no machine has done them when the first checkpoint is seen
    micro_batch_size=2,
    global_batch_size=4,
    lr=1e-3,
    lr_warmup_iters=1,
    eval_interval=40,
    eval_iters=1,
    save_interval=2,
    async_save=True,
)


def start(component: str, arguments: dict, disk: Path) -> subprocess.Popen[str]:
    disk.mkdir()
    return subprocess.Popen(
        [sys.executable, POD, component, json.dumps(arguments)],
        env={**os.environ, "TMPDIR": str(disk), "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def common(folder: Path, model: str, metrics: str) -> dict:
    """What steps have in common; their outputs have the names that the component gives them."""
    return {
        "code_version": "",
        "experiment": "",
        model: {"artifact": str(folder / "model")},
        metrics: {"artifact": str(folder / "metrics")},
    }


def share(artifacts: dict[str, Path], folder: Path) -> dict[str, dict[str, str]]:
    """Publish artifacts; component arguments that are pointers to them."""
    place = shared_place()
    assert place
    pointers = {}
    with place:
        for name, path in artifacts.items():
            staged = place.stage("test")
            shutil.copytree(path, staged)
            write_pointer(place.publish(staged), folder / name)
            pointers[name] = {"artifact": str(folder / name)}
    return pointers


def records(folder: Path, name: str) -> list[dict[str, float]]:
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens per second"} for line in lines
    ]


def test_a_pod_reads_what_another_put_on_the_volume(
    teacher: Path, dataset: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged weights there are refused by the next reader."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path / "volume"))
    inputs = share({"teacher": teacher, "dataset": dataset}, tmp_path)
    arguments = {"student_recipe": {"init": "prune", "num_layers": 2.0}, **inputs}
    outputs = ("student", "student_metrics")
    own = common(tmp_path / "a", *outputs)
    pod = start("convert_student", {**arguments, **own}, tmp_path / "disk-a")
    output = pod.communicate(timeout=PATIENCE)[0]
    assert pod.returncode == 0, output
    pointer = read_pointer(tmp_path / "a" / "model")
    assert pointer
    found = open_artifact(fetch(pointer, tmp_path), "student")
    expected = open_artifact(student, "student")  # made without a volume
    assert (found.parents, found.facts) == (expected.parents, expected.facts)
    assert json.loads((tmp_path / "a" / "metrics").read_text())

    shared_teacher = read_pointer(tmp_path / "teacher")
    assert shared_teacher
    weights = max(Path(shared_teacher.location).rglob("*.distcp"), key=lambda p: p.stat().st_size)
    with weights.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff")
    own = common(tmp_path / "b", *outputs)
    pod = start("convert_student", {**arguments, **own}, tmp_path / "disk-b")
    output = pod.communicate(timeout=PATIENCE)[0]
    assert pod.returncode == 1
    assert f"{weights.name} is missing or changed" in output
    assert not (tmp_path / "b" / "model").exists()


def test_a_preempted_training_goes_on_in_another_pod(
    teacher: Path,
    student: Path,
    dataset: Path,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the bucket is left of the first pod; losses are those of an unbroken training."""
    from flagscale.steps.distil_student import distil_student

    monkeypatch.setenv("FLAGSCALE_SHARED", bucket)
    inputs = {"teacher": teacher, "student": student, "dataset": dataset}
    arguments = {
        "distillation_recipe": DistillationRecipe().model_dump(mode="json"),
        "training_recipe": TRAINING.model_dump(mode="json"),
        "checkpoints": f"{bucket}/checkpoints",
        **share(inputs, tmp_path),
    }
    outputs = ("distilled_student", "training_metrics")
    own = common(tmp_path / "a", *outputs)
    pod = start("distil_student", {**arguments, **own}, tmp_path / "disk-a")
    store = ObjectStore(f"{bucket}/checkpoints")
    deadline = time.monotonic() + PATIENCE
    while not any(name.endswith("/latest.json") for name in store.sizes()):
        if pod.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    pod.kill()
    output = pod.communicate(timeout=PATIENCE)[0]
    assert pod.returncode == -9, output
    shutil.rmtree(tmp_path / "disk-a")

    own = common(tmp_path / "b", *outputs)
    pod = start("distil_student", {**arguments, **own}, tmp_path / "disk-b")
    distil_student(
        DistillationRecipe(), TRAINING, **inputs, checkpoints=tmp_path, output=tmp_path / "whole"
    )
    output = pod.communicate(timeout=PATIENCE)[0]
    assert pod.returncode == 0, output
    assert "resuming after step" in output
    pointer = read_pointer(tmp_path / "b" / "model")
    assert pointer
    assert pointer.location.startswith(f"{bucket}/artifacts/distilled-student-")
    found = fetch(pointer, tmp_path / "found")
    open_artifact(found, "distilled-student")
    for name in ("training", "validation"):
        assert records(found, name) == records(tmp_path / "whole", name)
    assert store.sizes() == {}  # no checkpoints, no lease
    assert list((tmp_path / "disk-b").glob("*")) == []
