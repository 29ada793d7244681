"""A training on two nodes that loses its launcher, is stopped, and still ends as if never stopped.

The component's own body is the launcher, as in a pod of KFP.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch import records

from flagscale.errors import UserError
from flagscale.ranks.nodes import NodePods
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.shared import read_pointer
from flagscale.steps.distil_student import distil_student
from flagscale.steps.distil_student_on_nodes import distil_student_on_nodes

PATIENCE = 300  # seconds: far more than is needed, on a machine with much else to do
# Enough steps that neither stop comes after the last one: the ranks of a launcher that is gone
# train on for some seconds.
TRAINING = TrainingRecipe(
    train_iters=40,
    micro_batch_size=2,
    global_batch_size=32,
    lr=1e-3,
    adam_eps=1e-5,
    eval_interval=20,
    eval_iters=1,
    save_interval=2,
)
LAUNCHER = """
import json, os, sys
from kfp import dsl
from components.distil_student_on_nodes.component import distil_student_on_nodes

def artifact(kind, name):
    return kind(name=name, uri=os.path.join(sys.argv[1], name))

if __name__ == "__main__":
    metrics = artifact(dsl.Metrics, "metrics")
    distil_student_on_nodes.python_func(
        distillation={}, training=json.loads(sys.argv[2]),
        checkpoints=os.environ["FLAGSCALE_SHARED"] + "/checkpoints", code_version="1",
        experiment="distillation", nodes=2, accelerator_count="0", pods={"cpu": "1"},
        teacher=artifact(dsl.Model, "teacher"), student=artifact(dsl.Model, "student"),
        dataset=artifact(dsl.Dataset, "dataset"), model=artifact(dsl.Model, "model"),
        metrics=metrics,
    )
    assert "torch" not in sys.modules
"""


class Launcher:
    """A start of the component's body."""

    def __init__(self, shared: Path) -> None:
        training = json.dumps(TRAINING.model_dump(mode="json", exclude_none=True))
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(shared), training],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, reached) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(self.process.communicate()[0])
            time.sleep(0.02)

    def end(self, number: int | None = None) -> tuple[int, str]:
        if number is not None:
            self.process.send_signal(number)
        output = self.process.communicate(timeout=PATIENCE)[0]
        return self.process.returncode, output


def checkpoint(shared: Path) -> int:
    """Steps done at the latest checkpoint."""
    found = list(shared.glob("checkpoints/*/latest.json"))
    return json.loads(found[0].read_text())["step"] if found else 0


def test_killed_stopped_and_finished_as_if_never_stopped(
    cluster, teacher, student, dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLAGSCALE_HEARTBEAT_SECONDS", "2")
    cluster.backoff_limit = 0
    shared = Path(os.environ["FLAGSCALE_SHARED"])
    for source in (teacher, student, dataset):
        shutil.copytree(source, shared / source.name)
    monkeypatch.delenv("FLAGSCALE_SHARED")
    inputs = [teacher, student, dataset]
    expected = tmp_path / "expected"
    figures = distil_student(
        DistillationRecipe(), TRAINING, *inputs, tmp_path / "checkpoints", expected
    )
    monkeypatch.setenv("FLAGSCALE_SHARED", str(shared))

    first = Launcher(shared)
    first.wait_for(lambda: checkpoint(shared) >= 2)
    assert first.end(signal.SIGKILL)[0] == -9
    (job,) = cluster.jobs.values()
    codes = [node.process.wait(timeout=PATIENCE) for node in job.nodes]
    assert codes == [1, 1], "the ranks trained on unseen"
    notes = sorted(shared.glob("launches/*/*/*/exit-code"))
    assert [note.read_text() for note in notes] == ["143\n", "143\n"]
    stopped = checkpoint(shared)
    assert 2 <= stopped < TRAINING.train_iters
    assert cluster.jobs, "nobody has deleted it yet"

    second = Launcher(shared)
    second.wait_for(lambda: checkpoint(shared) > stopped)
    code, output = second.end(signal.SIGTERM)
    assert code == 143, output
    assert "is left of an earlier try: deleting it" in output
    assert f"resuming after step {stopped}" in output
    stopped = checkpoint(shared)
    assert output.count(f"interrupted: stopped after step {stopped} of {TRAINING.train_iters}") == 1
    assert stopped < TRAINING.train_iters

    third = Launcher(shared)
    code, output = third.end()
    assert code == 0, output
    assert f"resuming after step {stopped}" in output
    assert len(cluster.gone) == 3
    assert not cluster.jobs
    pointer = read_pointer(shared / "model")
    assert pointer is not None
    for name in ("training", "validation"):
        ours = records(Path(pointer.location), name)
        assert len(ours) == len(records(expected, name))
        for found, wanted in zip(ours, records(expected, name), strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)
    told = json.loads((shared / "metrics").read_text())
    for name in ("validation logits distillation loss", "steps"):
        assert told[name] == pytest.approx(figures[name], rel=1e-5)
    assert not list(shared.glob("checkpoints/*/*"))
    assert not list(shared.glob("launches/*"))


def test_what_no_rank_could_train_is_refused_before_a_cluster_is_asked(
    teacher, student, dataset, tmp_path, monkeypatch
):
    def start(nodes: int) -> None:
        distil_student_on_nodes(
            DistillationRecipe(),
            TRAINING,
            teacher,
            student,
            dataset,
            tmp_path / "checkpoints",
            tmp_path / "out",
            nodes=nodes,
            accelerator_count=0,
            pods=NodePods(),
        )

    monkeypatch.delenv("FLAGSCALE_SHARED", raising=False)
    with pytest.raises(UserError, match="not a multiple of micro_batch_size=2 x 3 data-parallel"):
        start(nodes=3)
    with pytest.raises(UserError, match=r"FLAGSCALE_SHARED=\(unset\): a TrainJob needs a folder"):
        start(nodes=2)
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path))
    with pytest.raises(UserError, match=rf"teacher={teacher} must lie under {tmp_path}"):
        start(nodes=2)
