"""`submit --wait` against a real HTTP server that speaks KFP's API."""

import os
import re
import signal
from collections.abc import Callable, Iterator

import pytest

from pipelines.__main__ import main
from tests.pipelines.cluster.argo_nodes import tasks
from tests.pipelines.cluster.kfp_server import KfpServer
from tests.pipelines.cluster.runs import pod_node

WAIT = ["submit", "recipes/tiny.yaml", "--platform", "gke-h100", "--wait", "--poll-seconds", "0.01"]


def test_waiting_tells_each_change_and_the_outcome(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.frames = [
        tasks(prepare_data="DRIVER"),
        tasks(prepare_data="RUNNING"),
        tasks(prepare_data="SUCCEEDED", prepare_teacher="RUNNING"),
        tasks(prepare_data="SUCCEEDED", prepare_teacher=["FAILED", "BACKOFF"]),
        tasks(prepare_data="SUCCEEDED", prepare_teacher=["FAILED", "RUNNING"]),
        tasks(prepare_data="SUCCEEDED", prepare_teacher=["FAILED", "SUCCEEDED"]),
    ]
    kfp.failures = [("GET /apis/v2beta1/runs/", 503), ("GET /apis/v2beta1/runs/", 401)]
    assert main(WAIT) == 0
    out, _ = capsys.readouterr()
    told = re.findall(r"^\d:\d\d:\d\d  (\S+) +([A-Z]+)(.*)$", out, re.M)
    assert [t[:2] for t in told] == [
        ("prepare-data", "PENDING"),
        ("prepare-data", "RUNNING"),
        ("prepare-data", "SUCCEEDED"),
        ("prepare-teacher", "RUNNING"),
        ("prepare-teacher", "RETRYING"),
        ("prepare-teacher", "RUNNING"),
        ("prepare-teacher", "SUCCEEDED"),
    ]
    assert told[2][2].strip() == "1 min 05 s"
    assert told[5][2].endswith("  attempt 2 of 3")
    assert re.search(r"^tiny on gke-h100 .*: SUCCEEDED in .*\d s$", out, re.M)


def test_waiting_for_a_run_that_fails(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.outcome = "FAILED"
    kfp.frames = [tasks(prepare_data="SUCCEEDED", distil_student="FAILED", evaluate="LEFT OUT")]
    kfp.logs[pod_node("distil-student")] = b"09:00:00 distil-student: out of disk\n"
    assert main(WAIT) == 1
    out, err = capsys.readouterr()
    assert err.count("distil-student: out of disk\n") == 1
    assert "its retries allow 6" in err
    assert "driver" not in out + err
    assert f"/#/runs/details/{kfp.run.run_id}" in err


@pytest.mark.parametrize(("outcome", "code"), [("CANCELED", 1), ("SKIPPED", 0)])
def test_waiting_ends_with_every_last_state(kfp: KfpServer, outcome: str, code: int) -> None:
    kfp.outcome = outcome
    assert main(WAIT) == code


def test_waiting_has_an_end(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.frames = [tasks(prepare_data="RUNNING")] * 1000
    # Looks further apart than the time to wait: it looks at the start, and at the end if there is
    # time left after that.
    assert main([*WAIT[:-1], "10000", "--timeout", "0.1"]) == 2
    assert kfp.looks[kfp.run.run_id] in (1, 2)
    err = capsys.readouterr().err
    assert "the run is RUNNING still; the run goes on" in err
    assert f"python -m pipelines status {kfp.run.run_id} --wait" in err


def test_ctrl_c_ends_the_waiting_alone(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], ctrl_c: Callable[[], None]
) -> None:
    kfp.frames = [tasks(prepare_data="RUNNING")] * 1000
    kfp.on_look = lambda number: ctrl_c() if number == 1 else None
    assert main(WAIT) == 130
    err = capsys.readouterr().err
    assert "stopped waiting; the run goes on" in err
    assert "Terminate" in err
    assert not any("terminate" in request for request in kfp.written)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """What a terminal sends, to this process, whoever started it and with which handlers."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)
