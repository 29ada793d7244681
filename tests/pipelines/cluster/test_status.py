"""`status` against a real HTTP server that speaks KFP's API."""

import re
from datetime import UTC, datetime
from pathlib import Path

import kfp_server_api as api
import pytest

from pipelines.__main__ import main
from tests.pipelines.cluster.kfp_api import tasks
from tests.pipelines.cluster.kfp_server import KfpServer


@pytest.fixture
def run_id(kfp: KfpServer) -> str:
    run = api.V2beta1Run(run_id="run-1", display_name="one", created_at=datetime.now(UTC))
    kfp.runs["run-1"] = run
    return "run-1"


def test_a_running_run(kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.frames = [tasks(prepare_data="SUCCEEDED", prepare_teacher="RUNNING")] * 2
    assert main(["status", run_id]) == 0
    first, *steps, url = capsys.readouterr().out.splitlines()
    # The server writes times that have not come as year 1: the run is not minus 2000 years old.
    assert re.fullmatch(r"one: RUNNING in \d s", first)
    assert steps[0].split(maxsplit=2) == [
        "prepare-data",
        "SUCCEEDED",
        "1 min 05 s",
    ]
    assert re.fullmatch(r"  prepare-teacher +RUNNING +1 min 2\d s", steps[1])
    assert len(steps) == 2
    assert url == f"{kfp.url}/#/runs/details/{run_id}"


def test_a_failed_run(kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.outcome, kfp.error = "FAILED", "child 'x' failed"
    kfp.frames = [tasks(prepare_data="FAILED: no such bucket", prepare_teacher="FAILED")]
    assert main(["status", run_id]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("one: FAILED")
    assert "prepare-data: no such bucket\n" in captured.err
    assert "prepare-teacher: no error was recorded; see its log in the UI\n" in captured.err
    assert "child 'x' failed\n" in captured.err


def test_steps_of_a_loop_are_told_apart(
    kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.frames = [tasks(distil_student="SUCCEEDED") + tasks(distil_student="RUNNING")]
    assert main(["status", run_id, "--wait", "--poll-seconds", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "distil-student " in out
    assert "distil-student (2) " in out


def test_a_run_that_is_not_there(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "11111111-2222"]) == 2
    assert "the server has no run 11111111-2222" in capsys.readouterr().err


def test_a_server_that_goes_away_while_waiting(
    kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.frames = [tasks(prepare_data="RUNNING")] * 3
    kfp.failures = [("GET /apis/v2beta1/runs/", 503)] * 5
    assert main(["status", run_id, "--wait", "--poll-seconds", "0.05"]) == 0
    assert (
        "answered 503 (injected 503): try again later; asking again in" in capsys.readouterr().out
    )


def test_a_token_that_ends_while_waiting(
    kfp: KfpServer,
    run_id: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kfp.token = "first-token"
    monkeypatch.setenv("KFP_EXISTING_TOKEN", "first-token")
    kfp.frames = [tasks(prepare_data="RUNNING")] * 9
    kfp.on_look = lambda number: setattr(kfp, "token", "second-token") if number else None
    assert main(["status", run_id, "--wait", "--poll-seconds", "0.05"]) == 2
    err = capsys.readouterr().err
    assert "the token is wrong or has expired" in err
    assert f"the run goes on; python -m pipelines status {run_id} --wait" in err


def test_a_token_renewed_in_its_file_goes_unnoticed(
    kfp: KfpServer, run_id: str, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("first-token")
    kfp.token = "first-token"
    kfp.frames = [tasks(prepare_data="RUNNING")] * 3

    def renew(number: int) -> None:
        kfp.token = f"token-{number}"
        file.write_text(kfp.token)

    kfp.on_look = renew
    wait = ["status", run_id, "--wait", "--poll-seconds", "0.05", "--token-file", str(file)]
    assert main(wait) == 0
