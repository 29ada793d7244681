import os
from typing import Any, cast

import pytest

from flagscale import tracking
from flagscale.errors import Interrupted, UserError
from flagscale.execution.notes import note_error
from flagscale.execution.rank_folder import LostError, RankFolder
from flagscale.tracking import StepRun, step
from flagscale.tracking.letters import Begun
from flagscale.tracking.outbox import outbox_of


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_STEP_FOLDER", "")  # put back what `join` sets
    return RankFolder.create(tmp_path / "launch", {"steps": 3})


def ended(ranks: RankFolder, rank: int, code: int, message: str) -> None:
    mine = ranks.join(rank)
    note_error("distil-student", message)
    ranks.note_exit(mine, code)
    os.utime(mine / "exit-code", (rank, rank))


def test_the_first_ranks_run_in_mlflow_is_the_steps(ranks, monkeypatch):
    outbox = outbox_of(cast(Any, None), Begun("run of the rank", "0"))
    monkeypatch.setattr(step._Process, "run", StepRun(outbox))
    ranks.note_result({"loss": 2.5})
    monkeypatch.setattr(step._Process, "run", None)  # the launcher, which tracks nothing itself
    monkeypatch.setattr(step._Process, "run_of_ranks", None)
    assert ranks.result() == {"loss": 2.5}
    assert tracking.run_id_of_process() == "run of the rank"


def test_the_first_error_is_the_steps(ranks):
    ended(ranks, 2, 1, "connection closed by peer")
    ended(ranks, 1, 1, "loss is NaN")
    ended(ranks, 0, 143, "interrupted: stopped after step 2")
    assert list(ranks.exits().values()) == [143, 1, 1]
    with pytest.raises(UserError, match=r"^loss is NaN$"):
        ranks.raise_error(stopped=True, otherwise="killed")


def test_stopped_on_request_or_from_outside(ranks):
    for rank in range(2):
        ended(ranks, rank, 143, "interrupted: stopped after step 2 of 3")
    with pytest.raises(Interrupted, match=r"^stopped after step 2 of 3$"):
        ranks.raise_error(stopped=True, otherwise="killed")
    with pytest.raises(LostError, match=r"a node is drained: stopped after step 2 of 3$"):
        ranks.raise_error(stopped=False, otherwise="killed")


def test_who_failed_is_not_who_was_stopped_because_of_it(ranks):
    ended(ranks, 3, 1, "connection closed by peer")
    ended(ranks, 1, 1, "loss is NaN")
    ended(ranks, 0, 143, "interrupted: stopped after step 2")
    for rank in (10, 2):  # killed: they left no word
        ranks.join(rank)
    ranks.note_end(ranks.join(4))
    (ranks.path / "logs").mkdir()
    assert [rank.name for rank in ranks.failed()] == ["1", "3", "2", "10"]


def test_a_killed_rank_has_said_nothing(ranks):
    ranks.join(1)
    ended(ranks, 0, 143, "interrupted: stopped after step 2 of 3")
    with pytest.raises(UserError, match=r"^killed$"):
        ranks.raise_error(stopped=False, otherwise="killed")


def test_a_pod_that_is_started_anew_changes_nothing(ranks):
    """Kubernetes does so with one that failed, and with one that was killed."""
    ended(ranks, 0, 143, "interrupted: stopped after step 2 of 3")
    with pytest.raises(SystemExit) as end:
        ranks.join(0)
    assert end.value.code == 143
    ranks.join(1)
    with pytest.raises(SystemExit) as end:
        ranks.join(1)
    assert end.value.code == 137
    with pytest.raises(LostError, match=r"^rank 1 was killed, and started anew$"):
        ranks.raise_error(stopped=False, otherwise="killed")


def test_what_is_lost_is_told_from_mistakes(ranks):
    """A lost node's neighbours fail too; what they say because of it is not the reason."""
    ended(ranks, 0, 1, "connection closed by peer")
    with pytest.raises(LostError, match=r"^pod x is gone$"):
        ranks.raise_error(stopped=False, otherwise="pod x is gone", lost=True)
    with pytest.raises(UserError, match=r"^connection closed by peer$") as error:
        ranks.raise_error(stopped=False, otherwise="pod x is gone")
    assert not isinstance(error.value, LostError)


def test_the_result_is_waited_for(ranks):
    with pytest.raises(FileNotFoundError):
        ranks.result()
    ranks.note_result({"steps": 3})
    assert ranks.result(patience_seconds=5) == {"steps": 3} == ranks.request()
