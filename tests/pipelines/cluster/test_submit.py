"""`submit` against a real HTTP server that speaks KFP's API; see kfp_server.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import kfp_server_api as api
import pytest
import yaml

from components.image import VERSION
from flagscale.recipe import load_recipe
from pipelines.__main__ import main
from pipelines.cluster.package import version_tags
from pipelines.compiling import LOADER
from tests.pipelines.cluster.kfp_server import KfpServer

RECIPE = "recipes/tiny.yaml"
SUBMIT = ["submit", RECIPE, "--platform", "gke-h100"]
STATUS = ["status", "run-1"]
TOKEN = "planted-token-5f2a"


def lines(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    return captured.out, captured.err


def test_a_run_arrives_as_it_was_asked_for(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--parameter=distillation.temperature=2",
        "-pwhere_volume_claim=123",
        "--parameter=where_training_node_selector={pool: h100}",
        "--run-name=first",
        "--experiment-name=tries",
        "--service-account=runner",
    ]
    assert main([*SUBMIT, *given]) == 0
    out, _ = lines(capsys)
    run = kfp.run
    assert out.endswith(f"run {run.run_id}\n{kfp.url}/#/runs/details/{run.run_id}\n")
    assert (run.display_name, run.service_account) == ("first", "runner")
    assert [e.display_name for e in kfp.experiments.values()] == ["tries"]
    assert run.plugins_input == {"mlflow": {"experiment_name": "flagscale-distillation"}}
    (version,) = kfp.versions.values()
    assert run.pipeline_version_reference.pipeline_version_id == version.pipeline_version_id
    (pipeline,) = kfp.pipelines.values()
    assert (pipeline.name, pipeline.tags) == (
        "distillation-tiny",
        {"made-by": "flagscale-distillation"},
    )
    recipe = load_recipe(RECIPE)
    assert version.tags == {
        "kind": "single",
        "loss": "logits",
        "platform": "gke-h100",
        "recipe": "tiny",
        "release": VERSION,
        "teacher": recipe.teacher.source,
    }
    # Only what differs from the defaults, and sections whole: the server replaces, not merges.
    definitions = version.pipeline_spec["root"]["inputDefinitions"]["parameters"]
    defaults = definitions["distillation"]["defaultValue"]
    assert run.runtime_config.parameters == {
        "distillation": defaults | {"temperature": 2.0},
        "where_volume_claim": "123",
        "where_training_node_selector": {"pool": "h100"},
    }


def test_tags_say_what_a_version_is_of_within_kfps_limits() -> None:
    sweep = load_recipe("recipes/tiny-sweep.yaml")
    assert version_tags(sweep, "p")["kind"] == "sweep"
    assert version_tags(load_recipe("recipes/tiny-search.yaml"))["kind"] == "search"
    source = f"/models/{'deep/' * 20}teacher"
    teacher = sweep.teacher.model_copy(update={"source": source})
    tags = version_tags(sweep.model_copy(update={"teacher": teacher}), "p" * 100)
    assert tags["teacher"] == source[-63:]
    assert tags["platform"] == "p" * 63


def test_kfps_mlflow_plugin_is_told_the_experiment_of_this_run(kfp: KfpServer) -> None:
    assert main([*SUBMIT, "-ptracking_experiment=of this run", "--experiment-name=kfp's"]) == 0
    assert kfp.run.plugins_input == {"mlflow": {"experiment_name": "of this run"}}


def test_files_of_this_machine_are_told_of_in_this_run_s_parameters_too(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*SUBMIT, f"-pteacher.source={tmp_path}"]) == 0
    assert (
        f"note: teacher.source={tmp_path} is a file or folder of this machine" in lines(capsys)[0]
    )


def test_an_equal_pipeline_is_uploaded_once_and_a_changed_one_again(kfp: KfpServer) -> None:
    assert main(SUBMIT) == main(SUBMIT) == 0
    assert len(kfp.versions) == 1
    assert len(kfp.runs) == 2
    # Another process, another order of hashes: the version is the same one.
    command = [sys.executable, "-m", "pipelines", *SUBMIT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pipeline: unchanged, version distillation-tiny-" in done.stdout
    assert main([*SUBMIT, "--set", "training.lr=0.002"]) == 0
    assert (len(kfp.pipelines), len(kfp.versions), len(kfp.runs)) == (1, 2, 4)
    assert all(re.fullmatch(r"distillation-tiny-[0-9a-f]{12}", name) for name in kfp.packages)


def test_what_is_uploaded_is_what_compile_writes(kfp: KfpServer, tmp_path: Path) -> None:
    assert main(SUBMIT) == 0
    compiled = tmp_path / "pipeline.yaml"
    assert main(["compile", RECIPE, "--platform", "gke-h100", "-o", str(compiled)]) == 0
    assert list(kfp.packages.values()) == [compiled.read_bytes()]


def test_without_cache_the_run_carries_its_pipeline(kfp: KfpServer) -> None:
    assert main([*SUBMIT, "--no-cache"]) == 0
    assert (kfp.pipelines, kfp.versions) == ({}, {})
    sent = kfp.run.pipeline_spec
    assert "kubernetes" in sent["platform_spec"]["platforms"]
    steps = sent["pipeline_spec"]["root"]["dag"]["tasks"]
    assert len(steps) >= 6
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in steps.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["-ptrainin.lr=1"], "did you mean training_lr?"),
        (["-ptracking_experiment={a: 1}"], "must be a text, not a mapping"),
        (["--set", "training.lr=x"], "training.lr='x'"),
        (["--platform", "moon"], "platform moon: no such file"),
        (["--timeout", "5"], "--timeout 5: is only of use in a wait; add --wait"),
        (["--poll-seconds", "5"], "--poll-seconds 5: is only of use in a wait; add --wait"),
        (["--host", "https://me:hidden@kfp.example.com"], "holds a user name or password"),
        (["--host", "https://kfp.example.com/#/runs"], "must be like https://kfp.example.com"),
        (["--host", "ftp://kfp.example.com"], "must start with http:// or https://"),
        (["--token-file", "nowhere"], "nowhere: no such file"),
    ],
)
def test_mistakes_are_found_before_the_server_is_asked(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert main([*SUBMIT, *given]) == 2
    _, err = lines(capsys)
    assert said in err
    assert "hidden" not in err
    assert kfp.requests == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--timeout", "abc"], "--timeout: abc: must be a number of seconds, more than 0"),
        (["--timeout", "-1"], "--timeout: -1: must be a number of seconds"),
        (["--poll-seconds", "inf"], "--poll-seconds: inf: must be a number of seconds"),
        (["--service-account", "Foo Bar"], "--service-account: 'Foo Bar': must be a name"),
    ],
)
def test_values_that_no_option_takes(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*SUBMIT, *given])
    assert said in lines(capsys)[1]


def test_a_token_is_sent_and_a_wrong_one_explained(
    kfp: KfpServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    kfp.token = TOKEN
    assert main(SUBMIT) == 2
    assert "answered 401 (not authenticated): it wants a token" in lines(capsys)[1]
    assert kfp.written == []
    monkeypatch.setenv("KFP_EXISTING_TOKEN", "wrong-token-77aa")
    assert main(STATUS) == 2
    _, err = lines(capsys)
    assert "the token is wrong or has expired" in err
    assert "wrong-token-77aa" not in err
    kfp.runs["run-1"] = api.V2beta1Run(run_id="run-1")
    assert main([*STATUS, "--existing-token", TOKEN]) == 0  # an option wins
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert main([*STATUS, "--token-file", str(tmp_path / "token")]) == 0
    lines(capsys)


def test_namespaces_of_a_server_with_many_users(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kfp.namespaces = ("team-a",)
    assert main(STATUS) == 2
    assert "--namespace or KFP_NAMESPACE" in lines(capsys)[1]
    assert main([*SUBMIT, "-n", "team-b"]) == 2
    err = lines(capsys)[1]
    assert "looking into namespace team-b" in err
    assert "answered 403 (not allowed)" in err
    assert "kubeflow-pipelines-edit in namespace team-b" in err
    assert kfp.written == []
    monkeypatch.setenv("KFP_NAMESPACE", "team-a")
    assert main(SUBMIT) == 0
    made = [*kfp.pipelines.values(), *kfp.experiments.values()]
    assert {value.namespace for value in made} == {"team-a"}


def test_a_namespace_that_does_nothing_is_told(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*STATUS, "-n", "team-a"]) == 2
    assert "--namespace team-a does nothing there" in lines(capsys)[0]


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        ({"failures": [("GET /apis/v2beta1/healthz", 404)]}, "has no KFP API there"),
        ({"failures": [("GET /apis/v2beta1/healthz", 500)]}, "answered 500: injected 500"),
        ({"page": "<html>Log in</html>"}, "answers with a web page"),
    ],
)
def test_what_is_no_kfp_is_told(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], arrange: dict[str, object], said: str
) -> None:
    for name, value in arrange.items():
        setattr(kfp, name, value)
    assert main(SUBMIT) == 2
    assert said in lines(capsys)[1]
    assert kfp.written == []


def test_no_server(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*SUBMIT, "--host", "http://127.0.0.1:9"]) == 2
    err = lines(capsys)[1]
    assert "http://127.0.0.1:9 cannot be reached" in err
    assert "kubectl port-forward" in err
    # Without a protocol it is https, which this server does not speak.
    assert main([*STATUS, "--host", kfp.url.removeprefix("http://")]) == 2
    assert "TLS failed" in lines(capsys)[1]
    monkeypatch.delenv("KFP_ENDPOINT")
    assert main(STATUS) == 2
    assert "no server is named: give --host or KFP_ENDPOINT" in lines(capsys)[1]


def test_reads_are_tried_again_and_writes_are_not(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.failures = [("GET /apis/v2beta1/healthz", 503), ("/pipelines/names/", 502)]
    assert main(SUBMIT) == 0
    assert kfp.failures == []
    kfp.failures = [("POST /apis/v2beta1/runs", 503)]
    assert main(SUBMIT) == 2
    assert "starting run" in (err := lines(capsys)[1])
    assert "answered 503 (injected 503)" in err
    assert len(kfp.runs) == 1


def test_a_refused_upload_leaves_no_empty_pipeline(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.failures = [("upload_version", 400)]
    assert main(SUBMIT) == 2
    assert re.search(
        r"uploading version distillation-tiny-\w+: .* 400: injected 400", lines(capsys)[1]
    )
    assert (kfp.pipelines, kfp.experiments, kfp.runs) == ({}, {}, {})


def test_an_empty_pipeline_that_has_to_stay_does_not_hide_why(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.failures = [("upload_version", 400), ("DELETE /apis/v2beta1/pipelines/", 403)]
    assert main(SUBMIT) == 2
    out, err = lines(capsys)
    assert re.search(r"^deleting pipeline distillation-tiny: .* 403 .*; the empty pipe", out, re.M)
    assert re.search(r"uploading version distillation-tiny-\w+: .* 400: injected 400", err)


def test_names_of_the_clients_environment(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KFP_ENDPOINT")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kfp.url)
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://ui.example.com/pipeline/")
    monkeypatch.setenv("KF_PIPELINES_DEFAULT_EXPERIMENT_NAME", "from-the-environment")
    assert main(SUBMIT) == 0
    assert [e.display_name for e in kfp.experiments.values()] == ["from-the-environment"]
    assert "https://ui.example.com/pipeline/#/runs/details/" in lines(capsys)[0]


def test_no_secret_of_this_machine_leaves_it(
    kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-hf-token")
    monkeypatch.setenv("KFP_EXISTING_TOKEN", TOKEN)
    assert main(SUBMIT) == 0
    for request in kfp.requests:
        sent = json.dumps(request.body) + request.file.decode() + str(request.query)
        assert "planted-hf-token" not in sent + str(request.headers)
        assert TOKEN not in sent
    assert {r.headers["authorization"] for r in kfp.requests} == {f"Bearer {TOKEN}"}


def test_the_packages_documents_are_the_ones_that_were_checked(kfp: KfpServer) -> None:
    """The test server is strict: a field that the backend does not know is refused."""
    assert main(SUBMIT) == 0
    from tests.pipelines.cluster.kfp_api import Refused, parse_package

    (data,) = kfp.packages.values()
    documents = list(yaml.load_all(data, LOADER))
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    next(iter(executors.values()))["tolerationz"] = []
    with pytest.raises(Refused, match="tolerationz"):
        parse_package(documents)
