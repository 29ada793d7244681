"""`submit --wait` against a real HTTP server that speaks KFP's API."""

import re
import subprocess
import sys
import threading

import pytest

from pipelines.__main__ import main
from tests.pipelines.cluster.kfp_api import tasks
from tests.pipelines.cluster.kfp_server import KfpServer

WAIT = ["submit", "recipes/tiny.yaml", "--platform", "gke-h100", "--wait", "--poll-seconds", "0.05"]


def test_waiting_tells_each_change_and_the_outcome(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.frames = [
        tasks(prepare_data="RUNNING"),
        tasks(prepare_data="SUCCEEDED", prepare_teacher="RUNNING"),
        tasks(prepare_data="SUCCEEDED", prepare_teacher="SUCCEEDED"),
    ]
    kfp.failures = [("GET /apis/v2beta1/runs/", 503), ("GET /apis/v2beta1/runs/", 401)]
    assert main(WAIT) == 0
    out, _ = capsys.readouterr()
    told = re.findall(r"^\d:\d\d:\d\d  (\S+) +(\S+)(?: +(.*))?$", out, re.M)
    assert [t[:2] for t in told] == [
        ("prepare-data", "RUNNING"),
        ("prepare-data", "SUCCEEDED"),
        ("prepare-teacher", "RUNNING"),
        ("prepare-teacher", "SUCCEEDED"),
    ]
    assert told[1][2] == "1 min 05 s"
    assert re.search(r"^tiny on gke-h100 .*: SUCCEEDED in \d+ s$", out, re.M)


def test_waiting_for_a_run_that_fails(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.outcome = "FAILED"
    kfp.frames = [
        tasks(prepare_data="SUCCEEDED", distil_student="FAILED: OOMKilled (exit code 137)")
    ]
    assert main(WAIT) == 1
    out, err = capsys.readouterr()
    assert "distil-student: OOMKilled (exit code 137)" in err
    assert "driver" not in out + err
    assert f"/#/runs/details/{kfp.run.run_id}" in err


@pytest.mark.parametrize(("outcome", "code"), [("CANCELED", 1), ("SKIPPED", 0)])
def test_waiting_ends_with_every_last_state(kfp: KfpServer, outcome: str, code: int) -> None:
    kfp.outcome = outcome
    assert main(WAIT) == code


def test_waiting_has_an_end(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.frames = [tasks(prepare_data="RUNNING")] * 1000
    # Looks further apart than the time to wait: it looks at the start and at the end.
    assert main([*WAIT[:-1], "100", "--timeout", "3"]) == 2
    assert kfp.looks == {kfp.run.run_id: 2}
    err = capsys.readouterr().err
    assert "the run is RUNNING still; the run goes on" in err
    assert f"python -m pipelines status {kfp.run.run_id} --wait" in err


def test_ctrl_c_ends_the_waiting_alone(kfp: KfpServer) -> None:
    kfp.frames = [tasks(prepare_data="RUNNING")] * 1000
    looked = threading.Event()
    kfp.on_look = lambda _: looked.set()
    command = [sys.executable, "-m", "pipelines", *WAIT]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert looked.wait(300), child.communicate(timeout=1)
    child.send_signal(2)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 130
    assert "stopped waiting; the run goes on" in err
    assert "Terminate" in err
    assert "Traceback" not in err
    assert not any("terminate" in request for request in kfp.written)
