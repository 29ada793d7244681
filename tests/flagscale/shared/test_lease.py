import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from moto.s3.responses import S3Response

from flagscale.errors import Interrupted, UserError
from flagscale.execution.exclusive import exclusively
from flagscale.execution.step_process import keep_exclusive, step_process
from flagscale.shared import lease
from flagscale.shared.lease import leased
from flagscale.shared.store import ObjectStore
from flagscale.shared.versions import VersionedObject

PATIENCE = 300  # seconds: far more than is needed, on a machine with much else to do

HOLD = """
import sys
from flagscale.shared import lease
lease._RENEW_SECONDS = 0.2
with lease.leased(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the two minutes after which a lease is old."""
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.1)


@contextmanager
def stopped_at(message: str) -> Iterator[None]:
    """SIGTERM when the lease's log says so."""

    class Stop(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if message in record.getMessage():
                signal.raise_signal(signal.SIGTERM)

    handler = Stop()
    lease.logger.addHandler(handler)
    try:
        yield
    finally:
        lease.logger.removeHandler(handler)


def code_of_a_step_on(place: str) -> object:
    """Exit code of a step that gets no further than to the place."""

    def step() -> None:
        with step_process("distil-student"):
            keep_exclusive(place)
            pytest.fail("not reached")

    with pytest.raises(SystemExit) as end:
        step()
    return end.value.code


def holder(place: str, **variables: str) -> subprocess.Popen[str]:
    """A process that holds it until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place],
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def pod(name: str, attempt: int = 0, run: str = "run-1") -> dict[str, str]:
    return {
        "KFP_RUN_ID": run,
        "KFP_POD_NAME": name,
        "KFP_POD_UID": f"uid-of-{name}",
        "KFP_RETRY_INDEX": str(attempt),
    }


def become(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def entry(bucket: str) -> dict:
    return json.loads(ObjectStore(bucket).read("checkpoints.lease") or b"")


def write(bucket: str, holder: str, renewed: float) -> bytes:
    content = json.dumps({"holder": holder, "renewed": renewed}).encode()
    ObjectStore(bucket).write("checkpoints.lease", content)
    return content


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_that_is_held_is_renewed_and_waited_for(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And that is told once, not at every look."""
    place = f"{bucket}/checkpoints"
    caplog.set_level("INFO")
    other = holder(place)
    looks: list[dict] = []

    def look(seconds: float) -> None:
        looks.append(entry(bucket))
        if len({one["renewed"] for one in looks}) > 3 and other.poll() is None:
            other.communicate()
        sleep(seconds)

    sleep = time.sleep
    monkeypatch.setattr(lease.time, "sleep", look)
    with leased(place):
        assert other.returncode == 0
    assert ObjectStore(bucket).read("checkpoints.lease") is None
    (told,) = [r.getMessage() for r in caplog.records if "waiting for" in r.getMessage()]
    assert looks[0]["holder"] in told


def test_one_of_a_killed_process_is_taken_when_it_is_old(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_STALE_SECONDS", 1.5)
    place = f"{bucket}/checkpoints"
    other = holder(place)
    other.kill()
    other.wait()
    left = entry(bucket)
    with leased(place):
        assert time.time() - left["renewed"] > lease._STALE_SECONDS


def test_the_next_attempt_takes_it_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before was killed a moment ago; KFP started this one because it is gone."""
    place = f"{bucket}/checkpoints"
    other = holder(place, **pod("training-1"))
    other.kill()
    other.wait()
    become(monkeypatch, **pod("training-2", attempt=1))
    with leased(place, patience_seconds=0.0):
        assert entry(bucket)["pod"]["name"] == "training-2"


def test_a_retried_run_gives_a_pod_its_name_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Argo names a pod after its place in the workflow."""
    place = f"{bucket}/checkpoints"
    other = holder(place, **pod("training"))
    other.kill()
    other.wait()
    become(monkeypatch, **pod("training") | {"KFP_POD_UID": "another"})
    with leased(place, patience_seconds=0.0):
        pass


@pytest.mark.parametrize(
    "late", [pod("training-1", attempt=0), pod("training-9", attempt=1, run="run-2")]
)
def test_an_earlier_attempt_and_another_run_do_not(
    bucket: str, monkeypatch: pytest.MonkeyPatch, late: dict[str, str]
) -> None:
    place = f"{bucket}/checkpoints"
    other = holder(place, **pod("training-2", attempt=1))
    become(monkeypatch, **late)
    with (
        pytest.raises(UserError, match=r"pod training-2 \(KFP run run-1\) writes there"),
        leased(place, patience_seconds=0.0),
    ):
        pytest.fail("not reached")
    other.communicate()
    assert other.returncode == 0


def test_one_that_is_not_given_up_is_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"{bucket}/checkpoints"
    monkeypatch.setattr(lease, "_PATIENCE_SECONDS", -lease._STALE_SECONDS)
    write(bucket, "pod-a:1:x", time.time() + PATIENCE)
    with pytest.raises(UserError, match=r"checkpoints: pod-a:1:x writes there"), leased(place):
        pytest.fail("not reached")


def test_who_has_lost_it_stops(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node had been cut off; the attempt after it has taken over."""
    place = f"{bucket}/checkpoints"
    become(monkeypatch, **pod("training-1"))

    def step_that_is_robbed() -> None:
        with step_process("distil-student"):
            keep_exclusive(place)
            become(monkeypatch, **pod("training-2", attempt=1))
            lease._Lease(place).take(0.0)
            time.sleep(PATIENCE)

    with pytest.raises(SystemExit) as end:
        step_that_is_robbed()
    assert end.value.code == 143
    assert isinstance(end.value.__context__, Interrupted)
    assert entry(bucket)["pod"]["name"] == "training-2"  # nor has it given it back


@pytest.mark.parametrize("taken", [False, True])
def test_of_many_that_write_one_does(bucket: str, taken: bool) -> None:
    found = VersionedObject(ObjectStore(bucket), "x.lease")
    if taken:
        assert found.write(b"before", None)
    version = found.read()
    with ThreadPoolExecutor(8) as threads:
        wrote = list(threads.map(lambda n: found.write(b"by %d" % n, version), range(8)))
    assert sorted(wrote) == [False] * 7 + [True]
    now = found.read()
    assert now
    assert now.content == b"by %d" % wrote.index(True)
    assert not found.write(b"late", None)
    if version:
        found.remove(version)  # of before
        assert found.read() == now
    found.remove(now)
    assert found.read() is None
    assert not found.write(b"late", now)


def test_a_write_whose_answer_was_lost_is_known_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library asks again, and is refused: by what it has written itself."""
    write = VersionedObject.write
    lost = iter([True])

    def write_unheard(self: VersionedObject, *arguments: object) -> bool:
        written = write(self, *arguments)
        return written and not next(lost, False)

    monkeypatch.setattr(VersionedObject, "write", write_unheard)
    with leased(f"{bucket}/checkpoints", patience_seconds=0.0):
        assert entry(bucket)["holder"]


@pytest.mark.parametrize("refuses", [False, True])
def test_a_store_without_conditions_is_found_out(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    """It ignores the headers, or says that it does not know them; then clocks decide."""
    put = S3Response.put_object

    def put_object(self: S3Response) -> object:
        conditions = [name for name in ("If-Match", "If-None-Match") if name in self.headers]
        if conditions and refuses:
            return 501, {}, "<Error><Code>NotImplemented</Code></Error>"
        self.headers = {n: v for n, v in self.headers.items() if n not in conditions}
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", put_object)
    caplog.set_level("INFO")
    place = f"{bucket}/checkpoints"
    with leased(place):
        assert "the lease goes by clocks" in caplog.text
        before = entry(bucket)
        wait_for(lambda: entry(bucket)["renewed"] > before["renewed"])
        with pytest.raises(UserError, match="writes there"), leased(place, patience_seconds=0.0):
            pytest.fail("not reached")
    assert ObjectStore(bucket).read("checkpoints.lease") is None


def test_a_full_disk_does_not_end_its_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room again before the lease is old, nobody else gets it."""
    place, write = str(tmp_path / "checkpoints"), ObjectStore.write
    left, failed = iter([True, True]), threading.Event()

    def write_if_room(store: ObjectStore, name: str, content: bytes) -> None:
        if (tmp_path / name).exists() and next(left, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if next(left, None) is None:
            failed.set()
        write(store, name, content)

    with leased(place):
        before = (tmp_path / "checkpoints.lease").read_bytes()
        monkeypatch.setattr(ObjectStore, "write", write_if_room)
        assert failed.wait(PATIENCE)  # and after two failures it is written again
        wait_for(lambda: (tmp_path / "checkpoints.lease").read_bytes() not in (before, b""))


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
    write = VersionedObject.write

    def write_and_stop(self: VersionedObject, *arguments: object) -> bool:
        written = write(self, *arguments)
        signal.raise_signal(signal.SIGTERM)
        return written

    monkeypatch.setattr(VersionedObject, "write", write_and_stop)
    assert code_of_a_step_on(f"{bucket}/checkpoints") == 143
    assert ObjectStore(bucket).read("checkpoints.lease") is None


def test_one_that_was_not_taken_is_not_given_back(bucket: str) -> None:
    """Though it is old: another may be taking it."""
    content = write(bucket, "pod-a:1:x", time.time() - 60)
    lease._Lease(f"{bucket}/checkpoints").release()
    assert ObjectStore(bucket).read("checkpoints.lease") == content


def test_signals_while_waiting_end_it(bucket: str) -> None:
    write(bucket, "pod-a:1:x", time.time() + PATIENCE)
    with stopped_at("waiting for pod-a"):
        assert code_of_a_step_on(f"{bucket}/checkpoints") == 143
