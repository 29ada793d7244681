"""What a step's log ends with, and where the log is read."""

import subprocess
import sys

import kfp_server_api as api
import pytest

from pipelines.__main__ import main
from pipelines.cluster.logs import last_words
from tests.pipelines.cluster.argo_nodes import tasks
from tests.pipelines.cluster.kfp_server import KfpServer
from tests.pipelines.cluster.runs import pod_name, pod_node

LAUNCHER = """\
F1128 09:51:27.000000      13 main.go:58] failed to execute component: exit status 1
time="2026-11-28T09:51:27.100Z" level=info msg="sub-process exited" argo=true error="<nil>"
Error: exit status 1
"""
MISTAKE = "09:51:26 distil-student: distillation.temperature=-1: must be more than 0\n"


@pytest.mark.parametrize("after", ["", LAUNCHER])
@pytest.mark.parametrize("before", ["", "Traceback (most recent call last):\n", "x\n" * 100])
def test_the_steps_own_error_is_its_last_word(before: str, after: str) -> None:
    words = ["distillation.temperature=-1: must be more than 0"]
    assert last_words(before + MISTAKE + after, "distil-student") == words
    # The task of several nodes is the same step.
    assert last_words(before + MISTAKE + after, "distil-student-on-nodes") == words


def test_what_a_real_step_ends_with() -> None:
    code = """
from flagscale.errors import UserError
from flagscale.execution.step_process import step_process

with step_process("distil-student"):
    raise UserError("student.source: no such folder\\nnor is there one like it")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    words = ["student.source: no such folder", "nor is there one like it"]
    assert last_words(done.stdout + LAUNCHER, "distil-student") == words


def test_an_error_of_several_lines_is_told_in_full() -> None:
    log = "09:51:20 step 1\n09:51:26 evaluate: two things:\n- one\n- two\n"
    assert last_words(log + LAUNCHER, "evaluate") == ["two things:", "- one", "- two"]


def test_a_step_that_was_killed_has_its_last_lines_shown() -> None:
    log = "".join(f"09:51:{second:02d} step {second}: loss 1.0\n" for second in range(60))
    assert last_words(log, "distil-student") == log.splitlines()[-20:]
    # What another step says, or what is no error's form, is not taken for an error.
    assert last_words("09:51:00 evaluate: no\n", "distil-student") == ["09:51:00 evaluate: no"]


def test_mlflow_may_have_the_word_after_it() -> None:
    log = MISTAKE + "09:51:27 MLflow was not told that distil-student failed: no answer\n"
    words = ["distillation.temperature=-1: must be more than 0"]
    assert last_words(log + LAUNCHER, "distil-student") == words


def test_what_the_launcher_could_not_do_is_no_error_of_the_step() -> None:
    log = "09:51:26 prepare-data: dataset is at s3://bucket/dataset\n"
    assert last_words(log, "prepare-data") == log.splitlines()
    launcher = "F1128 09:51:27.000000      13 main.go:58] failed to upload output: no such bucket\n"
    assert last_words(MISTAKE + launcher, "distil-student") == (MISTAKE + launcher).splitlines()


def test_a_log_of_the_launcher_alone_is_shown_as_it_is() -> None:
    assert last_words(LAUNCHER, "evaluate") == LAUNCHER.splitlines()
    assert last_words("", "evaluate") == []


@pytest.fixture
def failed(kfp: KfpServer) -> KfpServer:
    kfp.runs["run-1"] = api.V2beta1Run(run_id="run-1", display_name="one")
    kfp.outcome = "FAILED"
    kfp.frames = [tasks(prepare_data="CACHED", distil_student=["FAILED", "FAILED"])]
    return kfp


@pytest.mark.parametrize("artifact", ["main-logs", "executor-logs-1"])
def test_a_log_is_shown_whole(
    failed: KfpServer, capsys: pytest.CaptureFixture[str], artifact: str
) -> None:
    failed.log_artifact = artifact
    log = b"first\n\xff is no UTF-8\n" + MISTAKE.encode()
    failed.logs[pod_node("distil-student", 1)] = log
    assert main(["status", "run-1", "--log", "distil-student"]) == 0
    assert capsys.readouterr().out == log.decode(errors="replace") + "\n"


def test_a_log_that_was_not_archived_is_read_from_the_pod(
    failed: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    failed.pod_logs[pod_name("distil-student", 1)] = "from the pod"
    assert main(["status", "run-1", "--log", "distil-student"]) == 0
    assert capsys.readouterr().out == "from the pod\n"


def test_what_has_no_log_is_told(failed: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "run-1", "--log", "distil-student"]) == 2
    err = capsys.readouterr().err
    assert "reading artifact main-logs: there is none" in err
    pod = pod_name("distil-student", 1)
    assert f"try kubectl --namespace kubeflow logs {pod} --container main" in err
    assert main(["status", "run-1", "--log", "prepare-data"]) == 2
    assert "it was taken from the cache" in capsys.readouterr().err
    assert main(["status", "run-1", "--log", "evaluate"]) == 2
    assert "those that have begun: prepare-data, distil-student" in capsys.readouterr().err
    assert main(["status", "run-1", "--log", "evaluate", "--wait"]) == 2
    assert "leave out --wait" in capsys.readouterr().err


def test_a_page_in_the_logs_place_is_no_log(failed: KfpServer) -> None:
    """The UI's server answers with its page where it does not know a path."""
    failed.pod_logs[pod_name("distil-student", 1)] = '{"page": "in place of a log"}'
    assert main(["status", "run-1", "--log", "distil-student"]) == 2
