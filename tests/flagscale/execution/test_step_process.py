import fcntl
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from kfp import dsl

from flagscale.data.sources import documents
from flagscale.errors import UserError
from flagscale.execution.exclusive import delete_unless_held, exclusively
from flagscale.execution.metrics_file import read_metrics
from flagscale.execution.notes import FOLDER_VARIABLE, read_error
from flagscale.execution.step_process import keep_exclusive, step_process
from flagscale.recipe import StudentRecipe, TrainingRecipe
from flagscale.recipe.data import CorpusRecipe
from flagscale.stop import deferred_stop, stop_requested
from flagscale.tracking.letters import Begun
from flagscale.tracking.outbox import outbox_of
from flagscale.tracking.run import StepRun, truthful_status


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_users_error_is_noted_without_a_traceback(
    notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, step_process("convert-student") as step:
        step.section(StudentRecipe, {"init": "depth", "num_layer": 2.0})
    assert end.value.code == 1
    message = read_error(notes)
    assert message
    assert "convert-student" in message
    assert "did you mean 'num_layers'" in message
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_accelerators_that_cannot_be_used_end_the_step_before_its_work(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGSCALE_ACCELERATOR_COUNT", "0")  # which the step sets, for its ranks
    with pytest.raises(SystemExit) as end, step_process("evaluate", accelerators="8"):
        pytest.fail("it works on the CPU")
    assert end.value.code == 1
    message = read_error(notes)
    assert message
    assert "FLAGSCALE_ACCELERATOR_COUNT=8: this pod was given" in message
    with step_process("evaluate", accelerators="0"):
        pass  # whatever the machine


def test_a_bug_is_noted_with_its_type_and_shown_with_its_traceback(
    notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), step_process("evaluate"):
        raise ZeroDivisionError("no tokens")
    assert read_error(notes) == "ZeroDivisionError: no tokens"
    assert "Traceback" in capsys.readouterr().out


def test_a_signal_raises_at_once_or_is_left_to_the_loop(notes: Path) -> None:
    with pytest.raises(SystemExit) as end, step_process("prepare-data"):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143
    message = read_error(notes)
    assert message
    assert message.startswith("interrupted")

    with step_process("distil-student"), deferred_stop():
        assert not stop_requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
    assert not stop_requested()  # nobody's work is stopped by what another was asked


def test_what_goes_on_after_any_failure_does_not_go_on_after_a_signal(
    notes: Path, tmp_path: Path
) -> None:
    """MLflow's uploads, a listing of sources, an object store: each catches whatever comes."""

    class Client:
        def log_artifact(self, *_: object) -> None:
            signal.raise_signal(signal.SIGTERM)

        def set_terminated(self, _run: str, status: str) -> None:
            told.append(status)

    class Stopped(MemoryFileSystem):
        protocol = "stopped"

        def info(self, *_: object, **__: object) -> dict[str, object]:
            signal.raise_signal(signal.SIGTERM)
            return {"name": "a.jsonl", "type": "file", "size": 0}

    told: list[str] = []
    fsspec.register_implementation("stopped", Stopped, clobber=True)
    corpus = CorpusRecipe(name="c", source="stopped://bucket/a.jsonl")
    run = StepRun(outbox_of(cast(Any, Client()), Begun("run", "0")))
    for work in (
        lambda: run.log_artifact(tmp_path / "report.html"),
        lambda: next(documents(corpus)),
    ):
        with pytest.raises(SystemExit) as end, step_process("evaluate"), truthful_status(run):
            work()
        assert end.value.code == 143
        assert read_error(notes) == "interrupted: stopped by a signal"
    assert told == ["KILLED", "KILLED"]


def test_a_signal_while_a_run_is_finished_is_seen_in_its_status() -> None:
    class Client:
        def set_terminated(self, _run: str, status: str) -> None:
            if status == "FINISHED":
                signal.raise_signal(signal.SIGTERM)
            told.append(status)

    told: list[str] = []
    run = StepRun(outbox_of(cast(Any, Client()), Begun("run", "0")))
    with pytest.raises(SystemExit) as end, step_process("evaluate"), truthful_status(run):
        pass
    assert end.value.code == 143
    assert told == ["FINISHED", "KILLED"]  # the last one counts


def test_a_signal_while_the_end_is_told_changes_nothing(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flagscale.execution.step_process.step_failed",
        lambda *_: signal.raise_signal(signal.SIGTERM),
    )
    with pytest.raises(SystemExit) as end, step_process("evaluate"):
        raise UserError("no such text")
    assert end.value.code == 1
    assert read_error(notes) == "no such text"


def test_forked_workers_end_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    """However early the signal comes: pools are closed while their workers are still starting."""
    with step_process("prepare-data"):
        for _ in range(30):
            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert pool.map(abs, [-1, -2]) == [1, 2]
    assert "Traceback" not in capfd.readouterr().err


def test_figures_go_to_the_metadata_and_the_file(tmp_path: Path) -> None:
    metrics = dsl.Metrics(name="metrics", uri=str(tmp_path / "out" / "metrics"))
    with step_process("evaluate") as step:
        step.report({"kl": 0.5, "speed": float("nan")}, metrics)
    assert metrics.metadata == {"kl": 0.5}
    told = read_metrics(Path(metrics.path), "evaluate")
    assert (told.figures, told.kfp_run_id) == ({"kl": 0.5}, None)


def test_kfps_floats_are_taken_for_integers() -> None:
    with step_process("distil-student") as step:
        training = step.section(TrainingRecipe, {"train_iters": 60.0, "lr": 3e-4})
    assert training.train_iters == 60


def test_one_process_at_a_time_writes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    hold = (
        "import sys\n"
        "from flagscale.execution.step_process import keep_exclusive, step_process\n"
        "with step_process('distil-student'):\n"
        f"    keep_exclusive({str(folder)!r})\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
        f"    open({str(tmp_path / 'left')!r}, 'w').close()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", hold], text=True, **pipes)
    assert other.stdout
    assert other.stdout.readline() == "held\n"
    waited = []

    def let_it_leave(seconds: float) -> None:
        waited.append(seconds)
        other.communicate()

    monkeypatch.setattr("flagscale.execution.exclusive.time.sleep", let_it_leave)
    with step_process("distil-student"):
        keep_exclusive(str(folder))
        assert (tmp_path / "left").exists()
    assert len(waited) == 1
    assert other.returncode == 0


def test_a_lock_that_was_deleted_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has opened it, and would get it now, takes the one that others find."""
    folder, flock, opened = tmp_path / "checkpoints", fcntl.flock, []

    def after_its_holder_has_deleted_it(descriptor: int, operation: int) -> None:
        if not opened:
            (tmp_path / "checkpoints.lock").unlink()
        opened.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_its_holder_has_deleted_it)
    with exclusively(str(folder)):
        assert len(opened) == 2
        assert not delete_unless_held(folder)
    assert delete_unless_held(folder)
    assert not (tmp_path / "checkpoints.lock").exists()


def test_a_held_folder_is_given_up_on_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flagscale.execution.exclusive._LOCK_SECONDS", -1.0)
    folder = str(tmp_path / "checkpoints")

    def hold() -> None:
        with step_process("distil-student"):
            keep_exclusive(folder)
            hold()

    with pytest.raises(SystemExit):
        hold()
    assert "another process writes there" in str(read_error(tmp_path))


def test_trainings_of_one_sweep_keep_each_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flagscale.execution.exclusive._LOCK_SECONDS", -1.0)
    one, two = (str(tmp_path / "checkpoints" / name) for name in ("one", "two"))
    with step_process("distil-student"):
        keep_exclusive(one)
        with step_process("distil-student"):
            keep_exclusive(two)
        with pytest.raises(SystemExit), step_process("distil-student"):
            keep_exclusive(one)
    with step_process("distil-student"):
        keep_exclusive(one)  # it was let go with the step
    assert "one: another process writes there" in str(read_error(tmp_path))


def test_user_error_is_what_section_raises() -> None:
    with pytest.raises(SystemExit) as end, step_process("x") as step:
        step.section(StudentRecipe, {"num_layers": "many"})
    assert isinstance(end.value.__context__, UserError)
