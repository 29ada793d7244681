"""Checkpoints of a training: contents, faults of one of two ranks, kills."""

import json
import math
import os
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.recipe import TrainingRecipe
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.setup import build_model_chunks, setup_training
from tests.flagscale.checkpoint.checkpoint_shape import SHAPE

HERE = Path(__file__).parent


@pytest.fixture
def trainer():
    recipe = TrainingRecipe(train_iters=1000, lr=1e-3)
    args = training_arguments(SHAPE, 16, recipe)
    with platform.runtime(), use_args(args):
        trainer = setup_training(build_model_chunks(args), args, recipe)
        trainer.optimizer.step()
        yield trainer


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def checkpoints(request, tmp_path):
    return TrainingCheckpoints(tmp_path / "checkpoints", keep=1, async_save=request.param)


def fill(trainer, value):
    for parameter in trainer.chunks[0].parameters():
        parameter.data.fill_(value)


def value(trainer):
    values = {one for p in trainer.chunks[0].parameters() for one in p.data.unique().tolist()}
    assert len(values) == 1
    return values.pop()


def save(checkpoints, trainer, step, loss=None):
    """A checkpoint whose weights are its step."""
    fill(trainer, float(step))
    validation = [] if loss is None else [{"step": step, "lm loss": loss}]
    checkpoints.save(TrainingState(step, validation=validation), trainer)


def draws():
    """One number of every generator."""
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return random.random(), np.random.rand(), torch.rand(1).item(), tracked


def test_random_states_go_on(trainer, checkpoints):
    draws()
    checkpoints.save(TrainingState(1), trainer)
    checkpoints.wait()
    expected = draws()
    assert draws() != expected
    checkpoints.restore(trainer)
    assert draws() == expected


def test_largest_losses_seen_go_on(trainer, checkpoints):
    machine = get_rerun_state_machine()
    for loss in (2.0, 7.0, 3.0):
        machine.is_unexpectedly_large(torch.tensor(loss), 10, "loss")
    checkpoints.save(TrainingState(1), trainer)
    checkpoints.wait()
    machine.max_values, machine.large_value_counts = {}, {}
    checkpoints.restore(trainer)
    assert machine.max_values == {"loss": 7.0}
    assert machine.large_value_counts == {"loss": 3}


def test_history_goes_on(trainer, checkpoints):
    state = TrainingState(2, [{"step": 1, "lm loss": 3.0}], [{"step": 2, "lm loss": math.nan}])
    checkpoints.save(state, trainer)
    state.training.append({"step": 3})  # training goes on
    checkpoints.wait()
    found = checkpoints.restore(trainer)
    assert (found.step, found.training) == (2, [{"step": 1, "lm loss": 3.0}])
    assert math.isnan(found.validation[0]["lm loss"])


def test_best_weights(trainer, checkpoints):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 4.0), (4, None)):
        save(checkpoints, trainer, step, loss)
    checkpoints.wait()
    assert checkpoints.restore_best(trainer) == 2
    assert value(trainer) == 2.0
    assert checkpoints.restore(trainer).step == 4
    assert value(trainer) == 4.0


def test_no_best_without_a_validation(trainer, checkpoints):
    save(checkpoints, trainer, 1)
    checkpoints.wait()
    with pytest.raises(UserError, match="no checkpoint of a step that was validated"):
        checkpoints.restore_best(trainer)


def test_a_step_is_written_once(trainer, checkpoints):
    save(checkpoints, trainer, 1)
    save(checkpoints, trainer, 1)
    checkpoints.wait()
    assert len(list(checkpoints.folder.glob("*step-*"))) == 1


def test_second_save_waits_for_the_first(trainer, tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, keep=3, async_save=True)
    for step in (1, 2, 3):
        save(checkpoints, trainer, step)
        assert len(list(tmp_path.glob("step-*"))) == step - 1
    fill(trainer, -1.0)
    checkpoints.wait()
    checkpoints.restore(trainer)
    assert value(trainer) == 3.0


def test_poll_completes_what_is_written(trainer, tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path, async_save=True)
    checkpoints.poll()
    save(checkpoints, trainer, 1)
    while not (tmp_path / "latest.json").exists():
        checkpoints.poll()
    assert checkpoints.restore(trainer).step == 1


def test_the_log_says_what_a_checkpoint_costs(trainer, checkpoints, caplog):
    caplog.set_level("INFO")
    save(checkpoints, trainer, 540)
    save(checkpoints, trainer, 540)  # is there, and costs nothing
    checkpoints.wait()
    size = sum(path.stat().st_size for path in checkpoints.folder.glob("step-*/**/*.*"))
    told = [r.getMessage() for r in caplog.records if "training waited" in r.getMessage()]
    (line,) = (re.sub(r"\d+\.\d+ s", "T", line) for line in told)
    megabytes = f"{size / 1e6:.1f} MB"
    assert line == f"checkpoint of step 540: training waited T, on disk after T, {megabytes}"


def test_of_another_training_is_refused(trainer, checkpoints):
    """The optimiser's moments are missing in a checkpoint of weights."""
    save(checkpoints, trainer, 1)
    checkpoints.wait()
    trainer.optimizer.optimizer.state.clear()
    checkpoints.save(TrainingState(2), trainer)
    checkpoints.wait()
    with pytest.raises(UserError, match=r"it lacks optimizer\.state\.exp_avg.* and \d+ more"):
        checkpoints.restore(trainer)


def start(folder, *command):
    SHAPE.save(folder)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[3])}
    return subprocess.Popen([*map(str, command), str(folder)], env=environment)


def end(process):
    try:
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def workers(tmp_path_factory, fork_server):
    """Folder and process of each script; at the same time, for most of theirs is imports."""
    names = ("faults", "kills")
    faults, kills = folders = [tmp_path_factory.mktemp(name) for name in names]
    processes = (
        start(faults, *fork_server.command(2, HERE / "fault_worker.py")),
        start(kills, *fork_server.python(HERE / "kill_worker.py")),
    )
    yield dict(zip(names, zip(folders, processes, strict=True), strict=True))
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def faults(workers):
    """What each of two ranks met; it ends in time because no rank waits for another for ever."""
    folder, process = workers["faults"]
    end(process)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return first


TOO_LARGE = "could not be written: [Errno 27] File too large"


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("rank 0 writes 0 bytes", TOO_LARGE),
        ("rank 0 writes 5000 bytes", TOO_LARGE),
        ("rank 1 writes 0 bytes", TOO_LARGE),
        ("rank 1 writes 5000 bytes", TOO_LARGE),
        ("the first rank cannot end", "could not be written: [Errno 5] Input/output error"),
        ("unended is refused", "no complete checkpoint here"),
        ("of other layers", "cannot be read: Global shape mismatch"),
        ("of other shapes", "cannot be read: Global shape mismatch"),
        ("damaged __1_*.distcp", "cannot be read"),
        ("damaged common.pt", "common.pt is damaged"),
        ("damaged .metadata", ".metadata is damaged"),
        ("damaged metadata.json", "metadata.json: is damaged"),
    ],
)
def test_fault_of_one_rank_is_the_same_error_on_both(faults, attempt, message):
    assert faults["weights"][attempt].startswith("UserError: ")
    assert message in faults["weights"][attempt]


@pytest.mark.parametrize("who", ["rank 0 is", "rank 1 is", "both are"])
def test_a_stop_of_one_rank_stops_both(faults, who):
    assert faults["weights"][f"{who} stopped"] == "Interrupted: stopped by a signal"


def test_without_a_fault_there_is_no_error(faults):
    assert faults["weights"]["saved"] == faults["weights"]["loaded"] == "ok"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_fault_of_one_rank_leaves_the_checkpoint_before(faults, mode):
    ended = faults[mode]
    assert TOO_LARGE in ended["second, rank 1 limited"]
    assert ended["left"] == ["latest.json", "step-00000001"]
    assert ended["latest"] == 1
    assert ended["first"] == ended["third"] == "ok"
    assert ended["latest after it"] == 3


@pytest.fixture(scope="module")
def kills(workers):
    folder, process = workers["kills"]
    end(process)
    return json.loads((folder / "result.json").read_text())


def test_killed_at_random_moments(kills):
    """What is found is whole, and is the last that was complete or the one after it."""
    before = 0
    for kill in kills["kills"]:
        assert kill["wrong"] == 0
        assert kill["found"] in (before, before + 1)
        assert kill["left behind"] == 0
        before = kill["last"]
    assert len(kills["kills"]) > 5


def test_writer_dies_with_its_training(kills):
    assert kills["while writing"] == {"left behind": 0, "complete": 0}


def test_writer_survives_a_signal_to_the_process_group(kills):
    assert kills["stopped"] == {"status": 0, "complete": 1}
