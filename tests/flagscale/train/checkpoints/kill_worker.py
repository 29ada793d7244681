"""Trainings killed with -9 at random moments of saving: `kill_worker.py FOLDER`.

Imports once, then forks: each child saves one checkpoint after another, all of whose numbers are
the step, until it is killed; the next one loads what is there first. Leaves FOLDER/result.json.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from flagscale.execution.step_process import step_process
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import TrainingRecipe
from flagscale.stop import deferred_stop
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.setup import build_model_chunks, setup_training

KILLS = 8


def numbers(trainer):
    """Every weight and moment of the trainer."""
    state = trainer.optimizer.optimizer.state
    for parameter in trainer.chunks[0].parameters():
        yield parameter.data
        yield state[parameter]["exp_avg"]


@contextlib.contextmanager
def trainer_of(shape: ModelShape):
    recipe = TrainingRecipe(train_iters=1000, lr=1e-3)
    args = training_arguments(shape, 16, recipe)
    with platform.runtime(), use_args(args):
        trainer = setup_training(build_model_chunks(args), args, recipe)
        trainer.optimizer.step()
        yield trainer


def save_for_ever(shape: ModelShape, folder: Path, told: Path, *, async_save: bool) -> None:
    """Go on from what is there; tell which step was found, and every step that is the latest."""
    with trainer_of(shape) as trainer:
        checkpoints = TrainingCheckpoints(folder, keep=1, async_save=async_save)
        state = checkpoints.restore(trainer)
        wrong = sum(int((one != state.step).sum()) for one in numbers(trainer)) if state.step else 0
        told.write_text(json.dumps({"found": state.step, "wrong": wrong}))
        while True:
            state.step += 1
            for one in numbers(trainer):
                one.fill_(float(state.step))
            # The best is never the newest: two folders and both pointers change.
            state.validation.append({"step": state.step, "lm loss": float(state.step)})
            checkpoints.save(state, trainer)
            for one in numbers(trainer):
                one.fill_(-1.0)  # training goes on while the checkpoint is written
            checkpoints.wait()
            with (told.with_suffix(".saved")).open("a") as stream:
                stream.write(f"{state.step}\n")


def left_behind(group: int, seconds: float = 60.0) -> int:
    """Processes of the group that are alive after some time."""
    deadline = time.monotonic() + seconds
    while True:
        alive = 0
        for process in psutil.process_iter():
            try:
                same = os.getpgid(process.pid) == group
                alive += same and process.status() != psutil.STATUS_ZOMBIE
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def slow_disk(seconds: float) -> None:
    """From now on every file takes so long."""
    write = FileSystemWriterAsync.write_preloaded_data

    def slowly(*args):
        time.sleep(seconds)
        write(*args)

    FileSystemWriterAsync.write_preloaded_data = slowly


def killed_while_writing(shape: ModelShape, folder: Path) -> dict:
    """A kill, and how many writers go on after it."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        slow_disk(600)
        with trainer_of(shape) as trainer:
            TrainingCheckpoints(folder, async_save=True).save(TrainingState(1), trainer)
            (folder / "begun").touch()
            time.sleep(600)
    while not (folder / "begun").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"left behind": left_behind(child), "complete": len(list(folder.glob("step-*")))}


def stopped_while_writing(shape: ModelShape, folder: Path) -> dict:
    """SIGTERM to the whole process group of a step while the checkpoint is written."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        slow_disk(0.5)
        with step_process("test"), deferred_stop(), trainer_of(shape) as trainer:
            checkpoints = TrainingCheckpoints(folder, async_save=True)
            checkpoints.save(TrainingState(1), trainer)
            os.killpg(0, signal.SIGTERM)
            checkpoints.wait()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return {"status": status, "complete": len(list(folder.glob("step-*")))}


def kill_once(shape: ModelShape, folder: Path, number: int, delay: float) -> dict:
    """Let a child save for `delay` seconds after its first checkpoint, and kill it."""
    told = folder / f"{number}.json"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            save_for_ever(shape, folder / "checkpoints", told, async_save=number % 2 == 1)
        finally:
            os._exit(1)
    saved = told.with_suffix(".saved")
    while not saved.exists():
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError(f"child {number} ended by itself")
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last = int(saved.read_text().split()[-1])
    return {**json.loads(told.read_text()), "last": last, "left behind": left_behind(child)}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    shape = ModelShape.load(folder)
    times = random.Random(3)
    results = [kill_once(shape, folder, n, times.uniform(0, 0.3)) for n in range(KILLS)]
    result = {
        "kills": results,
        "while writing": killed_while_writing(shape, folder / "slow"),
        "stopped": stopped_while_writing(shape, folder / "stopped"),
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
