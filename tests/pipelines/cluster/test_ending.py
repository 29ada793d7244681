"""What is said of a run that failed: its steps' last words, their attempts, and why no more."""

from pathlib import Path

import kfp_server_api as api
import pytest

from pipelines.__main__ import main
from pipelines.cluster.retry_policy import CONFIG_MAP, parse_retry_policy
from pipelines.cluster.workflow_nodes import node_id
from tests.deploy.argo_retries import MISTAKE, STOPPED, Attempt
from tests.pipelines.cluster import argo_retries as argo
from tests.pipelines.cluster.argo_nodes import tasks
from tests.pipelines.cluster.clusters import KUBECONFIG, OF_KFP_2_17, RIGHT, settings
from tests.pipelines.cluster.kfp_runs import real_run
from tests.pipelines.cluster.kfp_server import KfpServer
from tests.pipelines.cluster.runs import pipeline, pod_name, pod_node

LOG = b"09:51:26 distil-student: distillation.temperature=-1: must be more than 0\n"
SAID = "distillation.temperature=-1: must be more than 0"
PIPELINE = pipeline(prepare_data=2, distil_student=5)


@pytest.fixture
def failed(kfp: KfpServer) -> KfpServer:
    run = api.V2beta1Run(run_id="run-1", display_name="one", pipeline_spec=PIPELINE)
    kfp.runs["run-1"] = run
    kfp.outcome = "FAILED"
    return kfp


def told(capsys: pytest.CaptureFixture[str], run_id: str = "run-1") -> str:
    assert main(["status", run_id]) == 1
    return capsys.readouterr().err


def test_the_steps_own_error_is_told_once(
    failed: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    failed.frames = [
        tasks(prepare_data="CACHED", distil_student=["FAILED"] * 6, evaluate="LEFT OUT")
    ]
    failed.logs[pod_node("distil-student", 5)] = LOG
    err = told(capsys)
    assert err.startswith(f"error: the run failed\n  distil-student: {SAID}\n")
    assert err.count(SAID) == 1
    assert "python -m pipelines status run-1 --log distil-student" in err
    assert "kubectl" not in err
    assert "evaluate" not in err
    assert err.endswith(f"{failed.url}/#/runs/details/run-1\n")


def test_attempts_that_are_used_up(failed: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    failed.frames = [tasks(distil_student=["FAILED"] * 6)]
    err = told(capsys)
    each = ", ".join(["1 min 05 s"] * 6)
    assert f"    tried 6 times (FAILED after {each}); its retries allow no" in err


def test_a_policy_that_did_not_repeat_it(
    failed: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    failed.frames = [tasks(distil_student="FAILED")]
    err = told(capsys)
    assert "    tried once (FAILED after 1 min 05 s); its retries allow 6, but" in err
    assert "KFP's retry policy did not repeat it" in err
    assert "docs/cluster.md, retries" in err


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (OF_KFP_2_17, "the cluster's retry policy is OnError: a step whose pod is stopped"),
        (RIGHT, "the cluster's retry policy repeats a pod that was stopped, killed or lost, and"),
    ],
)
def test_the_policy_is_named_where_it_can_be_read(
    failed: KfpServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    strategy: str,
    said: str,
) -> None:
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.replace("SERVER", failed.url))
    failed.config_maps = {("kubeflow", CONFIG_MAP): settings(strategy)}
    failed.frames = [tasks(distil_student="FAILED")]
    assert main(["status", "run-1", "--kube-context", "lab"]) == 1
    assert f"its retries allow 6, but {said}" in capsys.readouterr().err


def test_a_step_that_was_begun_anew(failed: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    failed.frames = [tasks(distil_student=[["FAILED"] * 6] * 3)]
    err = told(capsys)
    assert "    tried 18 times (FAILED" in err
    assert err.count("; anew: ") == 2
    assert "its own retries allow 6, but KFP began anew what the step is in" in err


@pytest.mark.parametrize(
    ("strategy", "ending", "said"),
    [
        (OF_KFP_2_17, STOPPED, "tried once (FAILED after 1 min 05 s); its retries allow 6"),
        (RIGHT, MISTAKE, "tried once (FAILED after 1 min 05 s); its retries allow 6"),
        (RIGHT, STOPPED, "its retries allow no more: 6 attempts"),
        ("limit: 2, retryPolicy: Always", MISTAKE, "tried 18 times"),
    ],
)
def test_what_the_policies_of_clusters_lead_to(
    failed: KfpServer,
    capsys: pytest.CaptureFixture[str],
    strategy: str,
    ending: Attempt,
    said: str,
) -> None:
    policy = parse_retry_policy(settings(strategy))
    assert policy is not None
    failed.frames = [tasks(distil_student=argo.rounds(policy, 5, lambda _: ending))]
    assert said in told(capsys)


def test_a_driver_that_failed(failed: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    failed.frames = [tasks(prepare_data="BROKEN")]
    workflow = "distillation-x4k9z"
    driver = node_id(workflow, f"{workflow}(0).root(0).prepare-data-driver(0)")
    failed.logs[driver] = b"I1128 09:00:00.000000 1 main.go:1] KFP driver\nno such secret\n"
    err = told(capsys)
    assert "no such secret" in err
    assert "    KFP's driver was tried once" in err
    failed.logs.clear()
    pod = f"{workflow}-system-container-driver-{driver.rpartition('-')[2]}"
    assert f"its log, while its pod is there: kubectl --namespace kubeflow logs {pod} " in told(
        capsys
    )


def test_steps_that_failed_for_one_reason(
    failed: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    failed.frames = [tasks(prepare_data="FAILED", distil_student="FAILED")]
    for step in ("prepare-data", "distil-student"):
        failed.logs[pod_node(step)] = f"09:00:00 {step}: no such bucket\n".encode()
    err = told(capsys)
    assert "  prepare-data, distil-student: no such bucket\n" in err
    assert err.count("no such bucket") == 1
    assert "    prepare-data: tried once (FAILED" in err
    assert "    distil-student: tried once (FAILED" in err


def test_a_log_that_cannot_be_read(failed: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    failed.frames = [tasks(distil_student="FAILED")]
    err = told(capsys)
    assert (
        "distil-student: KFP has no log of it that can be read (reading artifact main-logs" in err
    )
    assert f"kubectl --namespace kubeflow logs {pod_name('distil-student')}" in err


def test_what_kfp_says_itself_is_told_too(
    failed: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    failed.error = "the workflow was deleted"
    failed.frames = [tasks(prepare_data="SUCCEEDED")]
    assert "  the workflow was deleted\n" in told(capsys)


def test_a_run_that_was_terminated_tells_of_no_failed_step(
    failed: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    failed.outcome = "CANCELED"
    failed.frames = [tasks(prepare_data="FAILED")]
    assert told(capsys) == f"error: the run canceled\n{failed.url}/#/runs/details/run-1\n"


def test_real_runs_that_failed(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    run = real_run("mistake-retried")
    run.pipeline_version_reference, run.pipeline_spec = None, PIPELINE
    kfp.runs[run.run_id] = run
    node = "distillation-wgx2x(0).root(0).distil-student(2).executor(5)"
    kfp.logs[node_id("distillation-wgx2x", node)] = LOG
    assert main(["status", run.run_id]) == 1
    captured = capsys.readouterr()
    assert [line.split()[:2] for line in captured.out.splitlines()[1:5]] == [
        ["prepare-data", "CACHED"],
        ["prepare-teacher", "FAILED"],
        ["convert-student", "CACHED"],
        ["distil-student", "FAILED"],
    ]
    # The cause comes first: the run was begun anew after it, and failed elsewhere then.
    assert captured.err.startswith(f"error: the run failed\n  distil-student: {SAID}\n")
    assert "    tried 18 times" in captured.err
    assert "    KFP's driver was tried 24 times" in captured.err
