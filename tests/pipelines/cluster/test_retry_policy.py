"""The retry policy of a cluster: read where that is allowed, and judged."""

from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.cluster.retry_policy import CONFIG_MAP, parse_retry_policy, warning
from tests.deploy.argo_retries import KILLED, MISTAKE, OUT_OF_MEMORY, STOPPED, VANISHED
from tests.pipelines.cluster import argo_retries as argo
from tests.pipelines.cluster.clusters import KUBECONFIG, OF_KFP_2_17, RIGHT, settings
from tests.pipelines.cluster.kfp_server import KfpServer

SUBMIT = ["submit", "recipes/tiny.yaml", "--platform", "gke-h100"]


@pytest.mark.parametrize(
    ("strategy", "danger"),
    [
        (RIGHT, None),
        (RIGHT.replace("retryPolicy: Always,", ""), None),
        (RIGHT.replace("limit: '2',", ""), "has no limit"),
        (RIGHT.replace(", 143", ""), "an expression without 143"),
        ("retryPolicy: Always", "begun anew without end"),
        ("limit: 2, retryPolicy: Always", "times the limit for each level"),
        ("limit: 2, retryPolicy: OnFailure", "whose pod vanishes with its node is not repeated"),
        ("limit: 2", "is OnFailure"),
        (OF_KFP_2_17, "is OnError: a step whose pod is stopped or killed is not repeated"),
        ("limit: 2, retryPolicy: OnTransientError", "stopped or killed is not repeated"),
        ("", "sets no policy"),
    ],
)
def test_policies_are_judged_by_what_they_do(strategy: str, danger: str | None) -> None:
    said = warning(parse_retry_policy(settings(strategy)))
    if danger is None:
        assert said is None
    else:
        assert said is not None
        assert said.startswith("warning: the retry policy of this cluster ")
        assert danger in said
        assert "deploy/components/retry-policy" in said
        assert "\n" not in said


ONCE, AGAIN = [["FAILED"]], [["FAILED", "SUCCEEDED"]]
OF_THE_CLUSTERS = {
    # strategy: what becomes of a mistake, memory that is out, a stop, a kill, a lost pod
    RIGHT: (ONCE, ONCE, AGAIN, AGAIN, AGAIN),
    OF_KFP_2_17: (ONCE, ONCE, ONCE, ONCE, AGAIN),
    "": ([["FAILED"] * 6], [["FAILED"] * 6], AGAIN, AGAIN, ONCE),
    "limit: '2', retryPolicy: Always": ([["FAILED"] * 6] * 3,) * 2 + (AGAIN,) * 3,
    "retryPolicy: Always": ([["FAILED"] * 6] * argo.MOST,) * 2 + (AGAIN,) * 3,
}


@pytest.mark.parametrize("strategy", OF_THE_CLUSTERS)
def test_the_judgement_is_what_argo_does(strategy: str) -> None:
    """A right policy repeats what was taken away, and nothing that would fail again."""
    policy = parse_retry_policy(settings(strategy))
    assert policy is not None
    lasting = [argo.rounds(policy, 5, lambda _, end=end: end) for end in (MISTAKE, OUT_OF_MEMORY)]
    passing = [
        argo.rounds(policy, 5, lambda number, end=end: argo.DONE if number else end)
        for end in (STOPPED, KILLED, VANISHED)
    ]
    assert (*lasting, *passing) == OF_THE_CLUSTERS[strategy]
    is_right = lasting == [ONCE] * 2 and passing == [AGAIN] * 3
    assert is_right == (policy.danger is None)


def test_settings_of_other_shapes() -> None:
    all_in_one = {"config": "workflowDefaults:\n  " + settings(OF_KFP_2_17)["workflowDefaults"]}
    assert parse_retry_policy(all_in_one) == parse_retry_policy(settings(OF_KFP_2_17))
    assert "sets no policy" in (warning(parse_retry_policy({})) or "")
    for unreadable in ("- 1", "spec: 1", "{", "spec: {templateDefaults: {retryStrategy: 1}}"):
        assert parse_retry_policy({"workflowDefaults": unreadable}) is None


@pytest.fixture
def cluster(kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KfpServer:
    """KFP behind the API of its cluster, as kubectl reaches it."""
    monkeypatch.delenv("KFP_ENDPOINT")
    monkeypatch.setenv("KFP_KUBE_CONTEXT", "lab")
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.replace("SERVER", kfp.url))
    return kfp


@pytest.mark.parametrize("command", [SUBMIT, ["schedule", *SUBMIT[1:], "--cron", "0 0 2 * * *"]])
def test_who_starts_runs_is_warned(
    cluster: KfpServer, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    cluster.config_maps = {("kubeflow", CONFIG_MAP): settings(OF_KFP_2_17)}
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.count("warning: the retry policy of this cluster is OnError") == 1
    assert len(cluster.runs) + len(cluster.schedules) == 1


@pytest.mark.parametrize(
    "found", [None, {}, {("kubeflow", CONFIG_MAP): settings(RIGHT)}], ids=["403", "404", "right"]
)
def test_nothing_is_said_where_nothing_is_wrong_or_known(
    cluster: KfpServer,
    capsys: pytest.CaptureFixture[str],
    found: dict[tuple[str, str], dict[str, str]] | None,
) -> None:
    cluster.config_maps = found
    assert main(SUBMIT) == 0
    assert "retry" not in capsys.readouterr().out
    asked = [r.path for r in cluster.requests if "configmaps" in r.path]
    assert asked == [f"/api/v1/namespaces/kubeflow/configmaps/{CONFIG_MAP}"]


def test_a_server_alone_tells_no_cluster(
    kfp: KfpServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What kubectl happens to know need not be where the server is."""
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.replace("SERVER", kfp.url))
    kfp.config_maps = {("kubeflow", CONFIG_MAP): settings(OF_KFP_2_17)}
    assert main(SUBMIT) == 0
    assert "retry" not in capsys.readouterr().out
    assert not any("configmaps" in request.path for request in kfp.requests)


def test_a_pod_without_an_account_sees_no_cluster(
    kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", kfp.url.rpartition(":")[2])
    assert main(SUBMIT) == 0
    assert "retry" not in capsys.readouterr().out
