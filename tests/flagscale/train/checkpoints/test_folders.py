"""Which checkpoint is the latest, which the best, whatever a kill has left."""

import json
import math

import pytest

from flagscale.errors import UserError
from flagscale.train.checkpoints.folders import CheckpointFolders


@pytest.fixture
def folders(tmp_path):
    return CheckpointFolders(tmp_path / "checkpoints", keep=2, best_by="lm loss")


def begin(folders, step, losses=None):
    """Write a checkpoint up to where it would be published; losses are step -> loss so far."""
    losses = losses or {}
    history = {
        "step": step,
        "layout": {"tensor": 1},
        "training": [],
        "validation": [{"step": at, "lm loss": loss} for at, loss in losses.items()],
    }
    partial = folders.begin(history)
    (partial / "state").mkdir()
    (partial / "state" / "tensors").write_text(str(step))
    (partial / "state" / "metadata.json").write_text("{}")
    return partial


def save(folders, step, losses=None):
    folders.publish(begin(folders, step, losses))


def kept(folders):
    return [int(path.name.removeprefix("step-")) for path in sorted(folders.root.glob("step-*"))]


def best_step(folders):
    best = folders.best()
    return best and best.step


def test_fresh(folders):
    assert folders.latest() is None
    assert folders.best() is None


def test_newest_and_best_stay(folders):
    losses = {}
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 4.0), (5, 6.0)):
        losses[step] = loss
        save(folders, step, losses)
    assert kept(folders) == [2, 4, 5]
    assert folders.latest().step == 5
    assert best_step(folders) == 2
    pointer = json.loads((folders.root / "best.json").read_text())
    assert pointer == {"step": 2, "folder": "step-00000002", "lm loss": 3.0}


def test_of_equal_losses_the_later_is_best(folders):
    save(folders, 1, {1: 3.0})
    save(folders, 2, {1: 3.0, 2: 3.0})
    assert best_step(folders) == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_no_number_is_never_best(folders, loss):
    save(folders, 1, {1: 3.0})
    save(folders, 2, {1: 3.0, 2: loss})
    assert best_step(folders) == 1


def test_step_that_was_not_validated_is_never_best(folders):
    save(folders, 1, {0: 1.0})
    assert folders.best() is None
    assert not (folders.root / "best.json").exists()


def test_step_that_does_not_count_is_never_best(folders):
    """It was saved because of the time; its loss must not decide."""
    folders = CheckpointFolders(folders.root, 2, "lm loss", may_be_best=lambda step: step % 2 == 0)
    save(folders, 1, {1: 1.0})
    assert best_step(folders) is None
    save(folders, 2, {1: 1.0, 2: 4.0})
    save(folders, 3, {1: 1.0, 2: 4.0, 3: 2.0})
    assert best_step(folders) == 2
    save(folders, 4, {1: 1.0, 2: 4.0, 3: 2.0, 4: 5.0})
    save(folders, 5, {1: 1.0, 2: 4.0, 3: 2.0, 4: 5.0, 5: 5.0})
    assert kept(folders) == [2, 4, 5]


def test_half_written_folder_is_ignored_and_deleted(folders):
    save(folders, 1)
    half = begin(folders, 2)
    assert folders.latest().step == 1
    other = begin(folders, 2)
    assert not half.exists()
    assert half != other


def test_renamed_but_not_pointed_to(folders):
    """Killed between the rename and the pointer: the step is done, and written, once more."""
    save(folders, 1)
    (folders.root / "latest.json").rename(folders.root / "kept")
    save(folders, 2)
    (folders.root / "kept").replace(folders.root / "latest.json")
    assert folders.latest().step == 1
    partial = begin(folders, 2)
    (partial / "state" / "tensors").write_text("again")
    folders.publish(partial)
    assert folders.latest().step == 2
    assert (folders.root / "step-00000002/state/tensors").read_text() == "again"


def test_set_back_by_hand(folders):
    """The new checkpoint is not older than those that the training was set back from."""
    folders = CheckpointFolders(folders.root, keep=3, best_by="lm loss")
    for step in (1, 8, 9):
        save(folders, step, {step: 1.0 / step})
    (folders.root / "latest.json").write_text('{"step": 1, "folder": "step-00000001"}')
    assert folders.latest().step == best_step(folders) == 1
    save(folders, 3, {3: 2.0})
    assert folders.latest().step == 3
    assert best_step(folders) == 1
    assert kept(folders) == [1, 3, 8, 9]


@pytest.mark.parametrize("pointer", ["", '{"step": 2', "[]", '{"folder": "step-00000007"}', None])
def test_pointer_that_points_nowhere(folders, pointer):
    save(folders, 1)
    save(folders, 2)
    path = folders.root / "latest.json"
    path.unlink() if pointer is None else path.write_text(pointer)
    assert folders.latest().step == 2


def test_half_written_pointer_is_ignored(folders):
    save(folders, 1)
    (folders.root / ".latest.json.partial").write_text('{"st')
    (folders.root / ".best.json.partial").write_text('{"st')
    assert folders.latest().step == 1


def test_stale_best_is_put_right(folders):
    save(folders, 1, {1: 3.0})
    (folders.root / "best.json").write_text('{"step": 9, "folder": "step-00000009", "lm loss": 0}')
    assert best_step(folders) == 1
    save(folders, 2, {1: 3.0, 2: 2.0})
    assert json.loads((folders.root / "best.json").read_text())["step"] == 2


def test_folder_without_its_last_file_is_no_checkpoint(folders):
    save(folders, 1)
    save(folders, 2)
    (folders.root / "step-00000002/state/metadata.json").unlink()
    assert folders.latest().step == 1


def test_damaged_history_is_named(folders):
    save(folders, 1)
    (folders.root / "step-00000001/history.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"history\.json: cannot be read.*delete .*step-00000001"):
        folders.latest()
