"""How a server is reached, and what of it is told; against real HTTP."""

import json
from pathlib import Path

import pytest
from kfp import Client
from kfp_server_api import ApiException

from flagscale.errors import UserError
from flagscale.recipe import load_recipe
from pipelines.cluster.connection import Connection
from pipelines.cluster.connection_errors import StoppedWaiting
from pipelines.cluster.server import Server
from pipelines.compiling import compile_recipe
from pipelines.platform import load_platform
from tests.pipelines.cluster.argo_nodes import tasks
from tests.pipelines.cluster.clusters import KUBECONFIG
from tests.pipelines.cluster.kfp_server import KfpServer

SECRET = "planted-cookie-93cd"


def test_a_cookie_is_sent_and_never_told(kfp: KfpServer) -> None:
    connection = Connection(host=kfp.url, cookies=f"session={SECRET}")
    Server(connection)
    assert {r.headers["cookie"] for r in kfp.requests} == {f"session={SECRET}"}
    assert SECRET not in repr(connection)


def test_a_secret_that_the_server_echoes_is_hidden(kfp: KfpServer) -> None:
    kfp.namespaces = ()
    connection = Connection(host=kfp.url, namespace=SECRET[:-1], existing_token=SECRET[:-1])
    with pytest.raises(UserError, match="not authorized in namespace \\*\\*\\*"):
        Server(connection)


def test_the_namespace_of_kfps_own_settings(kfp: KfpServer, tmp_path: Path) -> None:
    kfp.namespaces = ("team-a",)
    (tmp_path / "context.json").write_text(json.dumps({"namespace": "team-a"}))
    assert Server(Connection(host=kfp.url)).namespace == "team-a"


@pytest.mark.parametrize(("tag", "warned"), [("2.0.5", True), ("2.17.1", False), (None, False)])
def test_a_server_that_says_its_age_only_in_version_1(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], tag: str | None, warned: bool
) -> None:
    kfp.health, kfp.old_tag = {}, tag
    Server(Connection(host=kfp.url))
    assert ("older than the client's" in capsys.readouterr().out) == warned


def test_an_old_server_is_warned_of(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.health = {"apiServerTagName": "2.4.0"}
    Server(Connection(host=kfp.url))
    assert "the server is KFP 2.4.0, older than the client's 2.17.0" in capsys.readouterr().out


def test_ctrl_c_while_something_is_created(kfp: KfpServer) -> None:
    server = Server(Connection(host=kfp.url))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(StoppedWaiting, match=r"while starting: it may have been done .*/#/runs"):
        server.write("starting", interrupted)


@pytest.mark.parametrize(
    ("host", "ui_host", "url"),
    [
        ("http://a:8080/", None, "http://a:8080/#/runs/details/1"),
        ("https://a/pipeline", None, "https://a/pipeline/#/runs/details/1"),
        ("a.example.com", None, "https://a.example.com/#/runs/details/1"),
        ("http://api", "https://ui/pipeline/", "https://ui/pipeline/#/runs/details/1"),
        (None, None, "/pipeline/#/runs/details/1 of the KFP UI (--ui-host makes this a link)"),
    ],
)
def test_links(kfp: KfpServer, host: str | None, ui_host: str | None, url: str) -> None:
    server = Server(Connection(host=kfp.url))
    server.connection = Connection(host=host, ui_host=ui_host)
    assert server.url("runs", "details", "1") == url


def test_the_official_client_finds_a_server_here(kfp: KfpServer, tmp_path: Path) -> None:
    """By itself: the test's server was not made to fit our own calls."""
    recipe, platform = load_recipe("recipes/tiny.yaml"), load_platform("cpu-only")
    file = str(compile_recipe(recipe, platform, tmp_path / "pipeline.yaml"))
    client = Client(host=kfp.url)
    kfp.frames = [tasks(prepare_data="RUNNING"), tasks(prepare_data="SUCCEEDED")]
    run = client.create_run_from_pipeline_package(
        file, {"tracking_experiment": "x"}, "run", "tries"
    )
    done = client.wait_for_run_completion(run.run_id, timeout=600, sleep_duration=0)
    assert (done.state, done.display_name) == ("SUCCEEDED", "run")
    with pytest.raises(ApiException, match="requires type STRING"):
        client.create_run_from_pipeline_package(file, {"tracking_experiment": 1})
    client.create_recurring_run(
        client.get_experiment(experiment_name="tries").experiment_id,
        "nightly",
        cron_expression="0 0 2 * * *",
        pipeline_package_path=file,
    )
    (found,) = client.list_recurring_runs().recurring_runs
    assert client.delete_recurring_run(found.recurring_run_id) is not None


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_the_end_of_a_line_is_no_part_of_a_secret(kfp: KfpServer, tmp_path: Path, end: str) -> None:
    kfp.token = SECRET
    (tmp_path / "token").write_text(SECRET + end)
    Server(Connection(host=kfp.url, existing_token=SECRET + end, cookies=f"session={SECRET}{end}"))
    assert {r.headers["cookie"] for r in kfp.requests} == {f"session={SECRET}"}
    server = Server(Connection(host=kfp.url, token_file=tmp_path / "token"))
    (tmp_path / "token").write_text("renewed\n")
    kfp.token = "renewed"
    server.read("asking", server.client.get_kfp_healthz)


@pytest.mark.parametrize("secret", [f"{SECRET}\nX-Other: 1", f"{SECRET}€", f"{SECRET}\0", "\ufeff"])
def test_a_secret_that_no_header_holds_is_refused_and_not_told(tmp_path: Path, secret: str) -> None:
    (tmp_path / "token").write_text(secret, encoding="utf-8")
    for values in (
        {"existing_token": secret},
        {"cookies": secret},
        {"token_file": tmp_path / "token"},
    ):
        with pytest.raises(UserError, match="one line of printable ASCII") as error:
            Connection(**values)
        assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"), [(b"\n", "is empty"), (b"\x1f\x8b\x08\xff", "one line of printable ASCII")]
)
def test_a_file_that_holds_no_token(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(UserError, match=rf"token file .*/token: .*{said}"):
        Connection(token_file=tmp_path / "token")


@pytest.mark.parametrize(
    ("content", "context", "said"),
    [
        (KUBECONFIG, "moon", r"--kube-context moon: .*; known contexts: lab, lost$"),
        (KUBECONFIG, "lost", r"--kube-context lost: .*name x in .*clusters list"),
        (KUBECONFIG.replace("lab\n", "gone\n"), None, r"kubeconfig .*/kubeconfig: .*name gone in"),
        ("{", None, r"kubeconfig .*/kubeconfig: broken: while parsing"),
        ("hello", "lab", r"--kube-context lab: broken: "),
        (None, "lab", "no server is named: give --host"),
    ],
)
def test_a_cluster_that_kubectl_does_not_know(
    kfp: KfpServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    context: str | None,
    said: str,
) -> None:
    monkeypatch.delenv("KFP_ENDPOINT")
    if content is not None:
        (tmp_path / "kubeconfig").write_text(content)
    with pytest.raises(UserError, match=said):
        Server(Connection(kube_context=context))


@pytest.mark.parametrize("context", [None, "lab"])
def test_the_cluster_that_kubectl_knows_is_asked(
    kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: str | None
) -> None:
    monkeypatch.delenv("KFP_ENDPOINT")
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.replace("SERVER", kfp.url))
    server = Server(Connection(kube_context=context))
    assert server.read("asking", server.client.get_kfp_healthz) is not None
    assert all(request.by_kubernetes for request in kfp.requests)


def test_a_token_needs_a_host(
    kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP's client would give it to http://localhost."""
    monkeypatch.delenv("KFP_ENDPOINT")
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.replace("SERVER", kfp.url))
    with pytest.raises(UserError, match="no server is named"):
        Server(Connection(existing_token=SECRET))


def test_google_knows_nobody_here(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    with pytest.raises(
        UserError,
        match=r"Google gives no token for http://.*was not found.*GOOGLE_APPLICATION_CRED",
    ):
        Server(Connection(host=kfp.url, client_id="of the proxy"))
    assert kfp.requests == []
