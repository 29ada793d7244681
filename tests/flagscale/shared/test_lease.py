import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flagscale.errors import Interrupted, UserError
from flagscale.shared import lease
from flagscale.shared.lease import leased
from flagscale.shared.store import ObjectStore
from flagscale.steps.exclusive import exclusively
from flagscale.steps.step_process import keep_exclusive, step_process

HOLD = """
import sys, time
from flagscale.shared import lease
lease._STALE_SECONDS, lease._SETTLE_SECONDS = 2.5, 0.2
with lease.leased(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_STALE_SECONDS", 2.5)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.1)


def stop_soon() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


def code_of_a_step_on(place: str, meanwhile: Callable[[], object] = lambda: None) -> object:
    """Exit code of a step that gets no further than to the place."""

    def step() -> None:
        with step_process("distil-student"):
            meanwhile()
            keep_exclusive(place)
            pytest.fail("not reached")

    with pytest.raises(SystemExit) as end:
        step()
    return end.value.code


def holder(place: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, place, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_one_that_is_held_and_renewed_is_waited_for(bucket: str) -> None:
    place = f"{bucket}/checkpoints"
    other = holder(place, 3.5)  # longer than a lease lasts
    with leased(place):
        assert other.wait() == 0  # it had gone, or goes at once
    assert ObjectStore(bucket).read("checkpoints.lease") is None


def test_one_of_a_killed_process_is_taken_when_it_is_old(bucket: str) -> None:
    place = f"{bucket}/checkpoints"
    other = holder(place, 60.0)
    other.kill()
    other.wait()
    left = json.loads(ObjectStore(bucket).read("checkpoints.lease") or b"")
    with leased(place):
        assert time.time() - left["renewed"] > lease._STALE_SECONDS


def test_one_that_is_not_given_up_is_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"{bucket}/checkpoints"
    monkeypatch.setattr(lease, "_PATIENCE_SECONDS", -5.0)
    values = {"holder": "pod-a:1:x", "renewed": time.time()}
    ObjectStore(bucket).write("checkpoints.lease", json.dumps(values).encode())
    with pytest.raises(UserError, match=r"checkpoints: pod-a:1:x writes there"), leased(place):
        pytest.fail("not reached")


def test_who_has_lost_it_stops(bucket: str) -> None:
    """It had been cut off for so long that another has taken over."""
    place = f"{bucket}/checkpoints"

    def step_that_is_robbed() -> None:
        with step_process("distil-student"):
            keep_exclusive(place)
            values = {"holder": "pod-b:1:x", "renewed": time.time()}
            ObjectStore(bucket).write("checkpoints.lease", json.dumps(values).encode())
            time.sleep(60)

    with pytest.raises(SystemExit) as end:
        step_that_is_robbed()
    assert end.value.code == 143
    assert isinstance(end.value.__context__, Interrupted)
    assert b"pod-b" in (ObjectStore(bucket).read("checkpoints.lease") or b"")


def test_a_full_disk_does_not_end_its_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room again before the lease is old, nobody else gets it."""
    place, write = str(tmp_path / "checkpoints"), ObjectStore.write
    full = True

    def write_if_room(store: ObjectStore, name: str, content: bytes) -> None:
        if full and (tmp_path / name).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(store, name, content)

    monkeypatch.setattr(ObjectStore, "write", write_if_room)
    with leased(place):
        before = (tmp_path / "checkpoints.lease").read_bytes()
        time.sleep(1.0)  # two renewals fail
        full, deadline = False, time.monotonic() + 300
        while (tmp_path / "checkpoints.lease").read_bytes() in (before, b""):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"holder": "x"}'])
def test_one_that_says_nothing_is_free(bucket: str, content: bytes) -> None:
    ObjectStore(bucket).write("checkpoints.lease", content)
    with leased(f"{bucket}/checkpoints"):
        pass


def test_a_file_system_without_locks_gets_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusively(str(tmp_path / "checkpoints")):
        (found,) = tmp_path.glob("*.lease")
        assert json.loads(found.read_text())["holder"]
    assert list(tmp_path.glob("*.lease")) == []


def test_stopped_right_after_it_was_written_it_is_given_back(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 60.0)
    write = ObjectStore.write

    def write_and_stop(store: ObjectStore, name: str, content: bytes) -> None:
        write(store, name, content)
        stop_soon()

    monkeypatch.setattr(ObjectStore, "write", write_and_stop)
    assert code_of_a_step_on(f"{bucket}/checkpoints") == 143
    assert ObjectStore(bucket).read("checkpoints.lease") is None


def test_one_that_was_not_taken_is_not_given_back(bucket: str) -> None:
    """Though it is old: another may be taking it."""
    content = json.dumps({"holder": "pod-a:1:x", "renewed": time.time() - 60}).encode()
    ObjectStore(bucket).write("checkpoints.lease", content)
    lease._Lease(f"{bucket}/checkpoints").release()
    assert ObjectStore(bucket).read("checkpoints.lease") == content


def test_signals_while_waiting_end_it(bucket: str) -> None:
    place = f"{bucket}/checkpoints"
    values = {"holder": "pod-a:1:x", "renewed": time.time() + 60}
    ObjectStore(bucket).write("checkpoints.lease", json.dumps(values).encode())
    assert code_of_a_step_on(place, meanwhile=stop_soon) == 143
