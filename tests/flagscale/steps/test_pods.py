"""Steps in pods that share a volume or a bucket, and nothing else."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from kfp_pod import KfpPod, unshare

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
    save_interval=80,
    save_interval_minutes=1e-6,  # no longer than a step takes anywhere
)

pytestmark = pytest.mark.skipif(not unshare(), reason="this user may not make PID namespaces")


def start(component: str, arguments: dict, disk: Path, attempt: int = 0) -> KfpPod:
    disk.mkdir()
    environment = {
        **os.environ,
        "TMPDIR": str(disk),
        "PYTHONPATH": str(Path.cwd()),
        "MLFLOW_TRACKING_URI": f"sqlite:///{disk.parent}/mlflow.db",
        "KFP_RUN_ID": "run-1",
        "KFP_POD_NAME": f"{component}-{attempt}",
        "KFP_POD_UID": f"uid-{disk.name}",
        "KFP_RETRY_INDEX": str(attempt),
    }
    return KfpPod([POD, component, json.dumps(arguments)], environment, disk.parent)


def common(folder: Path, model: str, metrics: str, *reports: str) -> dict:
    """What steps have in common; their outputs have the names that the component gives them."""
    return {
        "code_version": "",
        "experiment": "",
        "accelerators": "0",
        model: {"artifact": str(folder / "model")},
        metrics: {"artifact": str(folder / "metrics")},
        **{report: {"artifact": str(folder / report)} for report in reports},
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
    arguments = {
        "student_recipe": {"init": "depth", "num_layers": 2.0},
        "models_recipe": {},
        "record_failure": False,
        **inputs,
    }
    outputs = ("student", "student_metrics", "student_report", "audit")
    own = common(tmp_path / "a", *outputs)
    pod = start("convert_student", {**arguments, **own}, tmp_path / "disk-a")
    code, output = pod.end()
    assert code == 0, output
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
    code, output = pod.end()
    assert code == 1
    assert f"{weights.name} is missing or changed" in output
    assert not (tmp_path / "b" / "model").exists()


def uploaded(store: ObjectStore) -> int:
    """Step of the latest checkpoint in the bucket, 0 if there is none."""
    for name in store.sizes():
        if name.endswith("/latest.json"):
            return int(json.loads(store.read(name) or b"")["step"])
    return 0


def wait_for_checkpoint(pod: KfpPod, store: ObjectStore, after: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while (step := uploaded(store)) <= after:
        assert pod.is_running(), pod.end()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return step


def test_a_training_whose_pods_go_ends_as_one_that_nobody_disturbed(
    teacher: Path,
    student: Path,
    dataset: Path,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is stopped and has no time to save, one vanishes; only the bucket is left of them.

    The next attempt goes on from the last checkpoint that the clock made, and waits for nobody.
    """
    from flagscale.steps.distil_student import distil_student

    monkeypatch.setenv("FLAGSCALE_SHARED", bucket)
    inputs = {"teacher": teacher, "student": student, "dataset": dataset}
    arguments = {
        "distillation_recipe": DistillationRecipe().model_dump(mode="json"),
        "training_recipe": TRAINING.model_dump(mode="json"),
        "of_many": {},
        "checkpoints": f"{bucket}/checkpoints",
        **share(inputs, tmp_path),
    }
    outputs = ("distilled_student", "training_metrics")
    store, left, output = ObjectStore(f"{bucket}/checkpoints"), 0, ""
    for attempt, end in enumerate((KfpPod.stop, KfpPod.vanish)):
        disk = tmp_path / f"disk-{attempt}"
        own = common(tmp_path / "out", *outputs)
        pod = start("distil_student", {**arguments, **own}, disk, attempt)
        left = wait_for_checkpoint(pod, store, left)
        end(pod)
        code, output = pod.end()
        assert code == (143 if end is KfpPod.stop else -9), output
        assert "on disk after" in output
        left = uploaded(store)
        shutil.rmtree(disk)
    assert "taken over from pod distil_student-0 (KFP run run-1)" in output

    own = common(tmp_path / "b", *outputs)
    pod = start("distil_student", {**arguments, **own}, tmp_path / "disk-b", 2)
    distil_student(
        DistillationRecipe(), TRAINING, **inputs, checkpoints=tmp_path, output=tmp_path / "whole"
    )
    code, output = pod.end()
    assert code == 0, output
    assert f"resuming after step {left} " in output
    assert "taken over from pod distil_student-1 (KFP run run-1)" in output
    assert "waiting for" not in output
    pointer = read_pointer(tmp_path / "b" / "model")
    assert pointer
    assert pointer.location.startswith(f"{bucket}/artifacts/distilled-student-")
    found = fetch(pointer, tmp_path / "found")
    open_artifact(found, "distilled-student")
    for name in ("training", "validation"):
        assert records(found, name) == records(tmp_path / "whole", name)
    assert store.sizes() == {}  # no checkpoints, no lease
    assert list((tmp_path / "disk-b").glob("*")) == []
