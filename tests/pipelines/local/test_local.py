"""The local runner, on a real small pipeline: real processes, real signals, a real MLflow."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest
from mlflow.entities import Run

from flagscale.execution.notes import read_process

TOY = Path(__file__).with_name("toy.py")
QUICK = {"steps": 2, "seconds": 0.05}
SLOW = {"steps": 400, "seconds": 0.1}


@dataclass
class Toy:
    """Runs of the toy pipeline in one folder; each test trains with checkpoints of its own."""

    runs: Path
    checkpoints: str = "first"

    def step(self) -> int:
        """Steps in the checkpoint."""
        done = self.runs / "checkpoints" / self.checkpoints / "done"
        return int(done.read_text() or 0) if done.exists() else 0

    def start(self, arguments: dict, **environment: str) -> subprocess.Popen[str]:
        arguments["checkpoints"] = str(self.runs / "checkpoints" / self.checkpoints)
        outside = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        return subprocess.Popen(
            [sys.executable, str(TOY), str(self.runs), json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**outside, **environment},
            start_new_session=True,  # its own group, as a shell would give it
        )

    def run(self, arguments: dict, **environment: str) -> tuple[int, list[str]]:
        return self.end(self.start(arguments, **environment))

    def end(self, process: subprocess.Popen[str]) -> tuple[int, list[str]]:
        out, _ = process.communicate(timeout=300)
        return process.returncode, out.splitlines()

    def wait_for_step(self, process: subprocess.Popen[str], checkpoint: int) -> psutil.Process:
        """The training step's process, once it has saved so many steps."""
        deadline = time.monotonic() + 300
        while self.step() < checkpoint:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        noted = read_process(self.runs / "latest" / "steps" / "train")
        assert noted
        return psutil.Process(int(noted.split(":")[0]))

    def tracked(self) -> list[tuple[Run, dict[str, Run]]]:
        """Parents, newest first, each with its children by name."""
        client = mlflow.MlflowClient(f"sqlite:///{self.runs}/mlflow.db")
        experiment = client.get_experiment_by_name("flagscale-distillation")
        assert experiment
        found = client.search_runs([experiment.experiment_id])
        children: dict[str, dict[str, Run]] = {}
        for run in found:
            parent = run.data.tags.get("mlflow.parentRunId")
            if parent:
                children.setdefault(parent, {})[run.info.run_name] = run
        return [
            (run, children.get(run.info.run_id, {}))
            for run in found
            if "mlflow.parentRunId" not in run.data.tags
        ]


def ended(step: psutil.Process) -> bool:
    """Whether it runs no more; an orphan may stay a zombie until somebody collects it."""
    return not step.is_running() or step.status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def fresh(toy: Toy, request: pytest.FixtureRequest) -> Toy:
    return Toy(toy.runs, request.node.name)


@pytest.fixture(scope="module")
def first(toy: Toy) -> tuple[int, list[str]]:
    return toy.run({"options": QUICK})


def test_a_run_says_each_step_and_nothing_of_kfp(first: tuple[int, list[str]]) -> None:
    code, lines = first
    assert code == 0, lines
    assert lines[0] == "[1/2] make ..."
    assert any(line.startswith("[2/2] train done in ") for line in lines)
    assert any(line.endswith(" from step 0") for line in lines)  # the step's own line came through
    noise = [x for x in lines if "KFP" in x or "Executing task" in x or "-----" in x or "Warn" in x]
    assert not noise


def test_a_run_beside_the_current_folder_is_a_run_like_any_other(toy: Toy) -> None:
    """KFP spells `../runs` in its own way."""
    beside = Toy(toy.runs / "folder" / ".." / "beside")
    (toy.runs / "folder").mkdir()
    code, lines = beside.run({"options": QUICK})
    assert code == 0, lines
    assert lines[0] == "[1/2] make ..."
    assert (beside.runs / "latest" / "model" / "weights").exists()
    assert len(beside.tracked()[0][1]) == 1


def test_a_run_is_tracked_as_parent_and_children(toy: Toy, first: tuple[int, list[str]]) -> None:
    parent, children = toy.tracked()[-1]
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "toy")
    assert parent.data.params["training.lr"] == "0.001"
    assert set(children) == {"train"}  # `make` does not track
    train = children["train"]
    assert train.info.status == "FINISHED"
    assert train.data.params == {"training.steps": "2.0", "training.seconds": "0.05"}
    assert train.data.metrics == {"loss": 0.5}


def test_a_run_leaves_a_folder_with_links(toy: Toy, first: tuple[int, list[str]]) -> None:
    latest = toy.runs / "latest"
    assert (latest / "model" / "weights").read_text() == "1 2 3"
    assert "from step 0" in (latest / "run.log").read_text()
    facts = json.loads((latest / "summary.json").read_text())
    assert list(facts["steps"]) == ["make", "train"]
    assert (latest / "recipe.yaml").exists()


def test_reuse_and_damaged_outputs(toy: Toy, first: tuple[int, list[str]]) -> None:
    code, lines = toy.run({"options": QUICK})
    assert code == 0
    assert lines[0].startswith("[1/2] make reused from cache, made 2")
    assert lines[1].startswith("[2/2] train reused from cache")
    (parent, children), *_, (_, originals) = toy.tracked()
    assert parent.info.status == "FINISHED"
    assert children["train"].data.metrics == {"loss": 0.5}
    original = originals["train"].info.run_id
    assert children["train"].data.tags["flagscale.cached_from"] == original
    assert children["make"].data.metrics == {"words": 3.0}

    weights = next((toy.runs / "artifacts").glob("*/train/model/weights"))
    weights.write_text("1 2")
    code, lines = toy.run({"options": QUICK})
    assert code == 0
    assert "weights is missing or changed" in lines[1]
    assert lines[2] == "[2/2] train ..."


def test_a_failing_step_has_the_last_word(fresh: Toy) -> None:
    code, lines = fresh.run({"options": QUICK, "fail": "user"})
    assert code == 1
    assert lines[-1] == "error: make failed: fail=user: must be empty"
    assert "Traceback" not in "\n".join(lines)
    assert fresh.tracked()[0][0].info.status == "FAILED"


def test_sigterm_stops_and_the_next_run_goes_on(fresh: Toy) -> None:
    process = fresh.start({"options": SLOW})
    step = fresh.wait_for_step(process, 3)
    process.terminate()
    code, lines = fresh.end(process)
    assert code == 143, lines
    assert lines[-1] == "train was stopped by SIGTERM; the same command goes on from there"
    assert ended(step)
    (parent, children), *_ = fresh.tracked()
    assert parent.info.status == children["train"].info.status == "KILLED"

    done = fresh.step()
    code, lines = fresh.run({"options": {**SLOW, "steps": done + 1}})
    assert code == 0
    assert any(line.endswith(f" from step {done}") for line in lines)


def test_ctrl_c_reaches_the_whole_group_and_stops_once(fresh: Toy) -> None:
    process = fresh.start({"options": SLOW})
    step = fresh.wait_for_step(process, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the shell and the step as well
    code, lines = fresh.end(process)
    assert code == 130, lines
    assert any("interrupted: after step" in line for line in lines)  # it saved, then ended
    assert ended(step)
    assert fresh.tracked()[0][1]["train"].info.status == "KILLED"


def test_a_stubborn_step_is_killed_after_the_grace(fresh: Toy) -> None:
    process = fresh.start({"options": {**SLOW, "stubborn": True}}, FLAGSCALE_GRACE_SECONDS="0.5")
    step = fresh.wait_for_step(process, 1)
    process.terminate()
    code, _ = fresh.end(process)
    assert code == 143
    assert ended(step)


def test_kill_9_of_the_step_then_of_the_runner(fresh: Toy) -> None:
    process = fresh.start({"options": SLOW})
    fresh.wait_for_step(process, 2).kill()
    code, lines = fresh.end(process)
    assert code == 1
    assert lines[-1].startswith("error: train failed: it ended without a word: killed")
    (parent, children), *_ = fresh.tracked()
    assert parent.info.status == children["train"].info.status == "FAILED"

    process = fresh.start({"options": SLOW})
    step = fresh.wait_for_step(process, fresh.step() + 2)
    process.kill()
    process.wait()
    step.wait(timeout=300)  # it saw that its runner is gone
    assert fresh.tracked()[0][0].info.status == "RUNNING"

    done = fresh.step()
    code, lines = fresh.run({"options": {**SLOW, "steps": done + 1}})
    assert code == 0
    assert any(line.endswith(f" from step {done}") for line in lines)
    statuses = [parent.info.status for parent, _ in fresh.tracked()[:3]]
    assert statuses == ["FINISHED", "KILLED", "FAILED"]


def test_an_unreachable_server_stops_the_run_before_work(tmp_path: Path) -> None:
    code, lines = Toy(tmp_path).run({"options": QUICK}, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert code == 2
    assert lines[-1].startswith("error: MLFLOW_TRACKING_URI=http://127.0.0.1:9: no usable tracking")
    assert not list(tmp_path.glob("artifacts/*"))
