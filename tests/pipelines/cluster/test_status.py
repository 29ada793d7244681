"""`status` against a real HTTP server that speaks KFP's API."""

import re
from datetime import UTC, datetime
from pathlib import Path

import kfp_server_api as api
import pytest

from pipelines.__main__ import main
from tests.pipelines.cluster.argo_nodes import tasks
from tests.pipelines.cluster.kfp_runs import real_run
from tests.pipelines.cluster.kfp_server import BROKEN, CUT_OFF, KfpServer
from tests.pipelines.cluster.runs import pipeline, sweep_of

WAIT = ["--wait", "--poll-seconds", "0.01"]
GET_RUN = "GET /apis/v2beta1/runs/"


@pytest.fixture
def run_id(kfp: KfpServer) -> str:
    run = api.V2beta1Run(run_id="run-1", display_name="one", created_at=datetime.now(UTC))
    run.pipeline_spec = pipeline(prepare_teacher=2)
    kfp.runs["run-1"] = run
    return "run-1"


def test_a_running_run(kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.frames = [tasks(prepare_data="SUCCEEDED", prepare_teacher=["FAILED", "RUNNING"])] * 2
    assert main(["status", run_id]) == 0
    first, *steps, url = capsys.readouterr().out.splitlines()
    # The server writes times that have not come as year 1: the run is not minus 2000 years old.
    assert re.fullmatch(r"one: RUNNING in (\d min \d\d|\d+) s", first)
    assert re.split(r" {2,}", steps[0].strip()) == ["prepare-data", "SUCCEEDED", "1 min 05 s"]
    assert re.fullmatch(r"  prepare-teacher +RUNNING +\d.* s +attempt 2 of 3", steps[1])
    assert len(steps) == 2
    assert url == f"{kfp.url}/#/runs/details/{run_id}"


def test_a_run_that_has_ended(
    kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.frames = [tasks(prepare_data="CACHED", prepare_teacher="SUCCEEDED")]
    assert main(["status", run_id]) == 0
    first, *steps, url = capsys.readouterr().out.splitlines()
    assert first.startswith("one: SUCCEEDED in ")
    assert [step.split()[:2] for step in steps] == [
        ["prepare-data", "CACHED"],
        ["prepare-teacher", "SUCCEEDED"],
    ]
    assert url == f"{kfp.url}/#/runs/details/{run_id}"


def test_a_sweep_of_an_uploaded_version(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    """A real one, whose list of tasks stayed behind: the run had ended when two steps still ran."""
    run = real_run("sweep")
    version = api.V2beta1PipelineVersion(
        pipeline_id=run.pipeline_version_reference.pipeline_id,
        pipeline_version_id=run.pipeline_version_reference.pipeline_version_id,
        pipeline_spec=sweep_of("variants", default=["a", "b", "c", "d"]),
    )
    kfp.versions[version.pipeline_version_id] = version
    kfp.runs[run.run_id] = run
    assert main(["status", run.run_id]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "sweep: SUCCEEDED in 15 min 56 s"
    assert [line.split("  ")[1].split(" UNKNOWN")[0] for line in lines[2:4]] == [
        "convert-student [a]",
        "convert-student [b]",
    ]
    assert lines[8:10] == [
        "  convert-student [c]      UNKNOWN",
        "  convert-student [d]      UNKNOWN",
    ]
    assert "KFP's list of tasks ends before the run did" in lines[10]
    # The run's own variants, where it was given some.
    run.runtime_config = api.V2beta1RuntimeConfig(parameters={"variants": [{"name": "x=1"}] * 4})
    assert main(["status", run.run_id]) == 0
    assert "distil-student [x=1] " in capsys.readouterr().out


def test_a_run_whose_version_was_deleted(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = real_run("succeeded")
    kfp.runs[run.run_id] = run
    assert main(["status", run.run_id]) == 0
    assert "  distil-student           SUCCEEDED  16 s\n" in capsys.readouterr().out


def test_a_run_that_is_not_there(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "11111111-2222"]) == 2
    assert "the server has no run 11111111-2222" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (500, "answered 500: injected 500"),
        (503, "answered 503 (injected 503): try again later"),
        (BROKEN, "gives a broken answer: try again later"),
    ],
)
def test_a_server_in_trouble_ends_no_waiting(
    kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str], status: int, said: str
) -> None:
    kfp.frames = [tasks(prepare_data="RUNNING")] * 3
    kfp.failures = [(GET_RUN, status)] * 6
    assert main(["status", run_id, *WAIT]) == 0
    assert kfp.failures == []
    out = capsys.readouterr().out
    # What is over with the next look is not told of.
    assert out.count(f"{said}; asking again in") == 4


def test_a_server_that_is_away_ends_no_waiting(
    kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Connections end without an answer; KFP's client itself tries four times a look."""
    kfp.frames = [tasks(prepare_data="RUNNING"), tasks(prepare_data="SUCCEEDED")]
    kfp.failures = [(GET_RUN, CUT_OFF)] * 16
    assert main(["status", run_id, *WAIT]) == 0
    assert kfp.failures == []
    assert "; asking again in" in capsys.readouterr().out


def test_trouble_without_end_ends_the_waiting(
    kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.frames = [tasks(prepare_data="RUNNING")] * 1000
    kfp.failures = [(GET_RUN, 500)] * 1000
    assert main(["status", run_id, *WAIT, "--timeout", "0.1"]) == 2
    err = capsys.readouterr().err
    assert "answered 500: injected 500; the run goes on" in err
    assert f"python -m pipelines status {run_id} --wait" in err


def test_the_list_of_tasks_may_come_after_the_end(
    kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [("RUNNING", "RUNNING"), ("SUCCEEDED", "RUNNING"), ("SUCCEEDED", "SUCCEEDED")]

    def answer(number: int) -> None:
        kfp.runs[run_id].state, of_step = answers[number]
        details = api.V2beta1RunDetails(task_details=tasks(prepare_data=of_step))
        kfp.runs[run_id].run_details = details

    answer(0)
    kfp.on_look = answer
    assert main(["status", run_id, *WAIT]) == 0
    assert kfp.looks == {run_id: 3}
    assert re.search(r"prepare-data +SUCCEEDED +1 min 05 s", capsys.readouterr().out)


@pytest.mark.parametrize("status", [400, 403])
def test_a_refusal_ends_the_waiting(
    kfp: KfpServer, run_id: str, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    kfp.frames = [tasks(prepare_data="RUNNING")] * 3
    kfp.failures = [(GET_RUN, status)]
    assert main(["status", run_id, *WAIT]) == 2
    assert f"answered {status}" in capsys.readouterr().err


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
    assert main(["status", run_id, *WAIT]) == 2
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
    assert main(["status", run_id, *WAIT, "--token-file", str(file)]) == 0
