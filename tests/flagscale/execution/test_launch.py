import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.execution import launch
from flagscale.execution.notes import REQUEST_VARIABLE
from flagscale.execution.rank_folder import RankFolder
from flagscale.execution.step_process import step_process
from flagscale.recipe import DistillationRecipe, ParallelismRecipe, TrainingRecipe
from flagscale.steps.distil_student import distil_student

PATIENCE = 300  # seconds: far more than is needed, on a machine with much else to do
RANKS = """
import os, time
from flagscale.errors import UserError

def run(what):
    rank = os.environ["RANK"]
    if what == "count":
        return {"ranks": int(os.environ["WORLD_SIZE"])}
    if what == "error" and rank == "1":
        os.write(2, b"below Python, on stderr\\n")
        raise UserError("the second rank says what is wrong")
    if what == "kill" and rank == "1":
        print("my last words", flush=True)
        os.kill(os.getpid(), 9)
    print("working", flush=True)
    time.sleep(600)
"""

PARENT = """
import sys
from flagscale.execution import launch
from flagscale.execution.step_process import step_process

with step_process("parent"):
    launch.run_on_ranks("ranks", "ranks:run", {"what": "sleep"}, 2)
"""


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    (tmp_path / "ranks.py").write_text(RANKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda what: launch.run_on_ranks("ranks", "ranks:run", {"what": what}, 2)


def test_first_ranks_result_comes_back(ranks):
    assert ranks("count") == {"ranks": 2}


def test_any_ranks_error_becomes_the_steps(ranks):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^the second rank says what is wrong$"):
        ranks("error")
    assert time.monotonic() - start < PATIENCE  # the other rank, which works on, is not waited for


def test_killed_rank_is_an_error(ranks):
    with pytest.raises(UserError, match="one of the processes was killed"):
        ranks("kill")


@pytest.mark.parametrize(
    ("what", "log"), [("error", "below Python, on stderr\n"), ("kill", "my last words\n")]
)
def test_the_log_of_the_rank_that_failed_goes_with_the_artifact_that_says_so(
    ranks, tmp_path, what, log, capfd
):
    """Whole, though it was killed; of the rank that failed alone, and seen on the way, too."""
    output = tmp_path / "output"
    with step_process("distil-student", record_failure_at=str(output)):
        ranks(what)
    manifest = open_artifact(output, "absent")
    (name,) = manifest.files
    assert re.fullmatch(r"failed-ranks/\d{8}T\d{6}-rank-1\.log", name)
    assert (output / name).read_text().endswith(log)
    shown = capfd.readouterr().out
    assert f"[rank 1] {log}" in shown
    assert "the end of the log" not in shown, "what was shown is not shown again"


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_the_step(ranks, tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for _ in range(2):
        while not process.stdout.readline().endswith("] working\n"):  # the parent tells, too
            assert process.poll() is None
    (torchrun,) = children(process.pid)
    found = children(torchrun)
    assert len(found) == 2
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == (143 if number == signal.SIGTERM else -9)
    deadline = time.monotonic() + PATIENCE
    while any(os.path.exists(f"/proc/{rank}") for rank in found):
        assert time.monotonic() < deadline, "a rank lives on"
        time.sleep(0.2)


def test_a_drained_nodes_ranks_have_as_long_as_it_gives_them(ranks, tmp_path, monkeypatch):
    """SIGTERM to torchrun, a pod's first process, reaches the ranks and ends nothing itself."""
    folder = RankFolder.create(tmp_path / "ranks", {"what": "sleep"})
    monkeypatch.setenv(REQUEST_VARIABLE, str(folder.path))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    torchrun = subprocess.Popen(
        launch.rank_command("ranks", "ranks:run", 1, "--standalone"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert torchrun.stdout
    assert torchrun.stdout.readline() == b"[rank 0] working\n"
    torchrun.terminate()
    _, errors = torchrun.communicate(timeout=PATIENCE)
    assert torchrun.returncode == 1
    assert b"SignalException" not in errors, "torch's own handler, which would give them 30 s"
    assert list(folder.exits().values()) == [143]


def test_a_node_that_waits_for_others_ends_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as master:  # which never answers
        port = master.getsockname()[1]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in {"NNODES": 2, "NODE_RANK": 1, **where}.items():
            monkeypatch.setenv(f"PET_{name}", str(value))
        torchrun = subprocess.Popen(launch.rank_command("ranks", "ranks:run", 1))
        master.settimeout(PATIENCE)
        with master.accept()[0]:
            assert torchrun.poll() is None
            torchrun.terminate()
            assert torchrun.wait(timeout=PATIENCE) == 143  # torchrun itself would end otherwise


TRAINING = TrainingRecipe(
    train_iters=40,  # so many that no machine has done them before it is stopped after the second
    micro_batch_size=2,
    global_batch_size=4,
    lr=1e-3,
    adam_eps=1e-5,
    eval_interval=20,
    eval_iters=1,
    save_interval=2,
)
LAYOUTS = [
    ParallelismRecipe(tensor_model_parallel_size=2, sequence_parallel=True),
    ParallelismRecipe(pipeline_model_parallel_size=2),
]

STEP = """
import sys
from pathlib import Path
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.steps.distil_student import distil_student
from flagscale.execution.rank_folder import RankFolder
from flagscale.execution.step_process import step_process

if __name__ == "__main__":
    training = TrainingRecipe.model_validate_json(sys.argv[1])
    with step_process("distil-student"):
        distil_student(DistillationRecipe(), training, *map(Path, sys.argv[2:]))
"""


def records(artifact: Path, name: str) -> list[dict[str, float]]:
    lines = (artifact / f"{name}.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens per second"} for line in lines
    ]


def test_stopped_on_one_layout_goes_on_on_another(teacher, student, dataset, tmp_path, python):
    """Stopped under TP2, finished under PP2: the curve of one process that was never stopped."""
    inputs = [teacher, student, dataset]
    distil_student(
        DistillationRecipe(), TRAINING, *inputs, tmp_path / "one-process", tmp_path / "expected"
    )
    paths = [*inputs, tmp_path / "checkpoints", tmp_path / "found"]
    for layout in LAYOUTS:
        training = TRAINING.model_copy(update={"parallelism": layout})
        command = python("-c", STEP, training.model_dump_json(), *paths)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if layout is LAYOUTS[0]:
            while not list(tmp_path.glob("checkpoints/*/latest.json")):
                assert process.poll() is None
                time.sleep(0.02)
            process.terminate()
        output = process.communicate(timeout=300)[0]
        assert process.returncode == (143 if layout is LAYOUTS[0] else 0), output
        # Told once, whatever the number of ranks.
        assert output.count("interrupted: stopped after step") == (layout is LAYOUTS[0]), output
    assert "resuming after step" in output
    for name in ("training", "validation"):
        for ours, theirs in zip(
            records(tmp_path / "found", name), records(tmp_path / "expected", name), strict=True
        ):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("parallelism", "message"),
    [
        ({"processes": 3}, "global_batch_size=4 is not a multiple of micro_batch_size=2 x 3"),
        (
            {"expert_model_parallel_size": 2, "processes": 3},
            "expert_model_parallel_size=2 with student.architecture.num_experts=None",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
            },
            "virtual_pipeline_model_parallel_size=2 with distillation.loss=logits",
        ),
    ],
)
def test_what_no_rank_could_train_is_refused_before_one_starts(
    teacher, student, dataset, tmp_path, parallelism, message, caplog
):
    training = TRAINING.model_copy(update={"parallelism": ParallelismRecipe(**parallelism)})
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match=message):
        distil_student(
            DistillationRecipe(), training, teacher, student, dataset, tmp_path, tmp_path / "out"
        )
    assert "starting" not in caplog.text
