"""Planted secrets are found nowhere: not in logs, notes, manifests, MLflow's database or files."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from flagscale import tracking

TOY = Path(__file__).parents[2] / "pipelines" / "local" / "toy.py"
PASSWORD = "planted:pass/word+1"
PLANTED = {
    "HF_TOKEN": "hf_plantedtoken0001",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key==0002",
    "DEPLOY_PRIVATE_KEY": "planted-first-line-0003\nplanted-second-line-0004",
}
PIECES = [
    *("hf_plantedtoken0001", "planted/secret", "planted-first-line", "planted-second-line"),
    *("planted:pass", quote(PASSWORD, safe=""), quote("planted/secret+key==0002", safe="")),
    base64.b64encode(b"me:" + PASSWORD.encode()).decode(),
    base64.b64encode(b"hf_plantedtoken0001").decode(),
]

STEP = """
import logging, os, sys, urllib3, warnings
from pathlib import Path
from flagscale import tracking
from flagscale.artifacts import new_artifact
from flagscale.execution.step_process import step_process

secrets = [os.environ[name] for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DEPLOY_PRIVATE_KEY")]
uri = os.environ["MLFLOW_TRACKING_URI"]
with step_process("planted", experiment="planted"):
    for text in [*secrets, uri]:
        logging.getLogger("a.library").warning("retrying with %s", text)
        logging.getLogger("another").error("broken", exc_info=KeyError(text))
        warnings.warn(f"weak: {text}")
        print("debug:", text)
        print(repr(text), file=sys.stderr)
    with tracking.step_run("planted", {"data": {"source": secrets[0], "uri": uri}}) as run:
        assert run.run_id, "tracked"
        run.set_tag("source", f"{uri} {secrets[1]}")
        run.log_text("\\n".join([*secrets, uri]), "environment.txt")
        with new_artifact(Path(sys.argv[1]), "dataset", {}, None, run.log_artifact) as staging:
            (staging.path / "words").write_text("one two")
        run.log_model(sys.argv[1], "planted")
        try:
            raise OSError(f"GET {uri}/x: 403 for {secrets[0]}")
        except OSError as error:
            raise RuntimeError(f"gave up on {uri} and {secrets}") from error
"""


@pytest.fixture
def with_credentials(server: str) -> str:
    return server.replace("://", f"://me:{quote(PASSWORD, safe='')}@")


def assert_clean(content: bytes | str, where: object) -> None:
    found = content if isinstance(content, bytes) else content.encode()
    for piece in PIECES:
        assert piece.encode() not in found, f"{piece} in {where}"


def assert_clean_files(*folders: Path) -> list[Path]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert_clean(path.read_bytes(), path)
    return files


def test_a_step_tells_none(
    with_credentials: str, server_folder: Path, tmp_path: Path, python: Callable[..., list[str]]
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    environment = {
        **os.environ,
        **PLANTED,
        "MLFLOW_TRACKING_URI": with_credentials,
        "KFP_RUN_ID": "planted",
        "FLAGSCALE_STEP_FOLDER": str(notes),
    }
    output = tmp_path / "output"
    command = python("-c", STEP, output)
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    text = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 1
    assert_clean(text, "the log")
    assert "gave up on http://" in text  # it went where it should
    assert text.count("retrying with ***") == 3
    assert text.count("retrying with http://***@127.0.0.1") == 1
    assert "gave up" in json.loads((notes / "error.json").read_text())["message"]
    files = assert_clean_files(tmp_path, server_folder)
    assert {"mlflow.db", "manifest.json", "environment.txt"} <= {path.name for path in files}


def test_a_run_of_the_pipeline_tells_none(
    with_credentials: str, server_folder: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, **PLANTED, "MLFLOW_TRACKING_URI": with_credentials}
    texts = []
    for fail in ("", "secret"):
        arguments = {
            "options": {"steps": 1, "seconds": 0.01},
            "checkpoints": str(tmp_path / "checkpoints"),
            "fail": fail,
        }
        ended = subprocess.run(
            [sys.executable, str(TOY), str(tmp_path), json.dumps(arguments)],
            env=environment,
            capture_output=True,
            timeout=300,
        )
        texts.append((ended.stdout + ended.stderr).decode())
        assert_clean(texts[-1], "the log")
    assert f"MLflow   http://{with_credentials.rpartition('@')[2]}" in texts[0]
    assert "make failed: ValueError: no login with ***" in texts[1]
    files = assert_clean_files(tmp_path, server_folder)
    assert {"run.log", "summary.json", "manifest.json"} <= {path.name for path in files}


def test_a_compiled_pipeline_holds_none(tmp_path: Path) -> None:
    uri = f"http://me:{quote(PASSWORD, safe='')}@mlflow"
    environment = {**os.environ, **PLANTED, "MLFLOW_TRACKING_URI": uri}
    recipe = Path(__file__).parents[3] / "recipes" / "tiny.yaml"
    command = [sys.executable, "-m", "pipelines", "compile", str(recipe), "--platform", "gke-h100"]
    subprocess.run([*command, "-o", str(tmp_path / "p.yaml")], env=environment, check=True)
    (file,) = assert_clean_files(tmp_path)
    assert "MLFLOW_TRACKING_PASSWORD" in file.read_text()  # by name, from a Secret


@pytest.fixture
def strange_server() -> Iterator[tuple[str, list[str | None]]]:
    """Notes who asks, and answers with an error that repeats it."""
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            body = f"{self.headers['Authorization']} may not".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{listener.server_address[1]}", seen
        listener.shutdown()


def test_credentials_of_the_url_reach_the_server_and_nobody_else(
    strange_server: tuple[str, list[str | None]], caplog: pytest.LogCaptureFixture
) -> None:
    address, seen = strange_server
    os.environ["MLFLOW_TRACKING_URI"] = f"http://me:{quote(PASSWORD, safe='')}@{address}"
    with tracking.step_run("evaluate", {}) as run:
        pass
    assert run.run_id is None
    assert seen == ["Basic " + base64.b64encode(b"me:" + PASSWORD.encode()).decode()]
    assert "nothing is tracked" in caplog.text
    assert_clean(caplog.text, "the log")
    assert os.environ["MLFLOW_TRACKING_URI"] == f"http://{address}"
