"""A training whose launcher or node is taken away, and that still ends as if never stopped.

The component's own body is the launcher, as in a pod of KFP.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch import records

from flagscale.artifacts import read_manifest
from flagscale.errors import UserError
from flagscale.execution.trainjob.nodes import NodePods
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
from components.training.distil_student_on_nodes.component import distil_student_on_nodes

def artifact(kind, name):
    return kind(name=name, uri=os.path.join(sys.argv[1], name))

if __name__ == "__main__":
    metrics = artifact(dsl.Metrics, "metrics")
    distil_student_on_nodes.python_func(
        distillation_recipe={}, training_recipe=json.loads(sys.argv[2]),
        checkpoints=os.environ["FLAGSCALE_SHARED"] + "/checkpoints", code_version="1",
        experiment="distillation", nodes=int(sys.argv[3]), accelerator_count="0",
        pods={"cpu": "1", "restarts": 1}, of_many={},
        teacher=artifact(dsl.Model, "teacher"), student=artifact(dsl.Model, "student"),
        dataset=artifact(dsl.Dataset, "dataset"),
        distilled_student=artifact(dsl.Model, "model"), training_metrics=metrics,
    )
    assert "torch" not in sys.modules
"""


class Launcher:
    """A start of the component's body."""

    def __init__(self, shared: Path, training: TrainingRecipe, nodes: int) -> None:
        section = json.dumps(training.model_dump(mode="json", exclude_none=True))
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(shared), section, str(nodes)],
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


@pytest.fixture(scope="module")
def undisturbed(teacher, student, dataset, tmp_path_factory):
    """The training in one process that is left alone: its artifact."""
    folder = tmp_path_factory.mktemp("undisturbed")
    inputs, expected = (teacher, student, dataset), folder / "expected"
    distil_student(DistillationRecipe(), TRAINING, *inputs, folder / "checkpoints", expected)
    return expected


@pytest.fixture
def shared(cluster, teacher, student, dataset, tmp_path):
    """The volume, with the training's inputs."""
    for source in (teacher, student, dataset):
        shutil.copytree(source, tmp_path / "shared" / source.name)
    return tmp_path / "shared"


def result(shared: Path) -> Path:
    pointer = read_pointer(shared / "model")
    assert pointer is not None
    return Path(pointer.location)


def weights(artifact: Path) -> dict[str, str]:
    """File -> digest, of all that holds numbers."""
    files = read_manifest(artifact).files
    return {name: value for name, value in files.items() if name.endswith(".distcp")}


def test_a_launcher_that_is_killed_leaves_nothing_that_trains_on(
    undisturbed, cluster, shared, monkeypatch
):
    """On two nodes: their ranks save and end, and the next launcher goes on from there."""
    monkeypatch.setenv("FLAGSCALE_HEARTBEAT_SECONDS", "2")
    cluster.backoff_limit = 0

    first = Launcher(shared, TRAINING, nodes=2)
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

    # This one must not fall silent, whatever else the machine does.
    monkeypatch.delenv("FLAGSCALE_HEARTBEAT_SECONDS")
    code, output = Launcher(shared, TRAINING, nodes=2).end()
    assert code == 0, output
    assert "is left of an earlier try: deleting it" in output
    assert f"resuming after step {stopped}" in output
    assert len(cluster.gone) == 2
    assert not cluster.jobs
    for name in ("training", "validation"):
        ours, theirs = records(result(shared), name), records(undisturbed, name)
        for found, wanted in zip(ours, theirs, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)
    told = json.loads((shared / "metrics").read_text())
    assert told["steps"] == TRAINING.train_iters
    assert not list(shared.glob("checkpoints/*/*"))
    assert not list(shared.glob("launches/*"))


def test_one_node_that_is_drained_saves_at_once_and_is_replaced(undisturbed, cluster, shared):
    """The signal arrives in the node's pod: nothing is lost, and no byte differs in the end."""
    never = TRAINING.model_copy(update={"save_interval": 10 * TRAINING.train_iters})

    launcher = Launcher(shared, never, nodes=1)
    launcher.wait_for(lambda: list(shared.glob("launches/*/*/0")))
    (job,) = cluster.jobs.values()
    (node,) = job.nodes
    # Before the first step: all of them take no longer than a busy machine may take to notice one.
    launcher.wait_for(lambda: "parameters in float32" in node.log.read_text())
    assert checkpoint(shared) == 0, "there is none but by the signal"
    cluster.drain(node.name)
    launcher.wait_for(lambda: checkpoint(shared))
    stopped = checkpoint(shared)
    code, output = launcher.end()
    assert code == 0, output
    assert 0 < stopped < never.train_iters
    assert f"is drained: stopped after step {stopped} of {never.train_iters}" in output
    assert "starting all nodes anew" in output
    assert f"resuming after step {stopped}" in output
    assert len(cluster.gone) == 2
    for name in ("training", "validation"):
        assert records(result(shared), name) == records(undisturbed, name)
    assert weights(result(shared)) == weights(undisturbed) != {}


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
