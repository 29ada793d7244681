"""A server that is away, answers 500, does what it was told and cannot say so, or is killed.

On SQLite and on PostgreSQL. In all of them the server is back only when the training is over: one
that waited for it would not end.
"""

import http.client
import os
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from mlflow_server import Server, served
from postgres_server import free_port, needs_postgres, postgres

from flagscale import tracking
from flagscale.errors import Interrupted
from flagscale.recipe import TrainingRecipe

_STEPS = 40
_TRAINING = TrainingRecipe(train_iters=_STEPS, lr=0.1, eval_interval=10, lr_warmup_iters=0)


class Door(ThreadingHTTPServer):
    """Stands before a server, and is in the `mood` to let requests through, or not."""

    daemon_threads = True

    def __init__(self, uri: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.there = urllib.parse.urlsplit(uri).netloc
        self.mood = "serves"
        self.heard: set[str] = set()
        self.turned_away = 0
        self.changed = threading.Condition()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def turns_away(self, more: int) -> None:
        """Wait until it has done so with so many more."""
        with self.changed:
            aim = self.turned_away + more
            assert self.changed.wait_for(lambda: self.turned_away >= aim, 300)


class Handler(BaseHTTPRequestHandler):
    server: Door
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        mood = self.server.mood
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, kind, content = 500, "text/plain", b"trouble"
        if mood in ("serves", "deaf"):
            there = http.client.HTTPConnection(self.server.there, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            there.request(self.command, self.path, body, headers)
            answer = there.getresponse()
            status, kind, content = answer.status, answer.headers["Content-Type"], answer.read()
            there.close()
        with self.server.changed:
            # "deaf": what is asked for is done, and the first answer of each kind is lost.
            asked = f"{self.command} {self.path.partition('?')[0]}"
            lost = mood == "away" or (mood == "deaf" and asked not in self.server.heard)
            if mood == "deaf":
                self.server.heard.add(asked)
            if lost or mood == "500":
                self.server.turned_away += 1
                self.server.changed.notify_all()
        if lost:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", kind or "text/plain")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):  # who asked may have lost patience
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def door(uri: str) -> Iterator[Door]:
    with Door(uri) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        os.environ |= {
            "MLFLOW_TRACKING_URI": found.uri,
            "MLFLOW_EXPERIMENT_NAME": "outage",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        }
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def postgres_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    password, folder = secrets.token_hex(8), tmp_path_factory.mktemp("postgres")
    with postgres(password) as port:
        store = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
        with served(store, folder, free_port(), PGPASSWORD=password) as server:
            yield server.uri


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def uri(request: pytest.FixtureRequest) -> str:
    fixtures = {"sqlite": "server", "postgres": "postgres_uri"}
    found: str = request.getfixturevalue(fixtures[request.param])
    return found


def record(step: int) -> dict[str, float]:
    losses = {"logits distillation loss": 1 / step, "lm loss": float("nan") if step == 7 else 2.0}
    return {"step": float(step), **losses, "learning rate": 0.1, "tokens per second": float(step)}


def validated(step: int) -> dict[str, float]:
    return {"step": float(step), "lm loss": 3.0 / step}


def train(
    first: int, last: int, trouble: dict[int, Callable[[], None]], stop: bool = False
) -> tracking.StepRun:
    """Steps `first` + 1 to `last`, with checkpoints; at some of them something happens."""
    validation = tracking.Split("validation", "sha256:" + "ab" * 32)
    with tracking.step_run("distil-student", {"training": {"lr": 0.1}}, "one training") as run:
        run.log_inputs([validation], ["validation"])
        told = tracking.TrackedTraining(run, _TRAINING, validation)
        before = [record(step) for step in range(1, first + 1)]
        told.begin(first, before, [validated(step) for step in range(10, first + 1, 10)])
        for step in range(first + 1, last + 1):
            trouble.get(step, lambda: None)()
            told.trained(record(step))
            if step % 10 == 0:
                told.validated(validated(step))
                told.kept([Path(f"/checkpoints/step-{i:08d}") for i in (step - 10, step) if i])
        run.describe("A training.")
        trouble.get(last + 1, lambda: None)()
        if stop:
            raise Interrupted
    return run


def check_whole(uri: str, run_id: str | None) -> None:
    """Every point, once; every checkpoint that is kept, once, with its figures, once."""
    client = mlflow.MlflowClient(uri)
    found = client.get_run(str(run_id))
    assert found.data.tags["mlflow.note.content"] == "A training."
    assert "flagscale.missing" not in found.data.tags
    for name in record(1):
        if name == "step":
            continue
        points = client.get_metric_history(str(run_id), f"train/{name}")
        told = sorted((point.step, str(point.value)) for point in points)
        assert told == sorted((i, str(record(i)[name])) for i in range(1, _STEPS + 1)), name
    points = client.get_metric_history(str(run_id), "validation/lm loss")
    losses = {step: 3.0 / step for step in range(10, _STEPS + 1, 10)}
    assert sorted((point.step, point.value) for point in points) == list(losses.items())
    models = client.search_logged_models([found.info.experiment_id], f"source_run_id = '{run_id}'")
    assert sorted(model.name for model in models) == ["step-00000030", "step-00000040"]
    for model in models:
        [figure] = model.metrics
        assert (figure.key, figure.value) == ("validation/lm loss", losses[int(model.name[5:])])
        assert (figure.dataset_name, figure.dataset_digest) == ("validation", ("ab" * 32)[:36])
    told_models = [output.model_id for output in found.outputs.model_outputs]
    assert len(told_models) == len(set(told_models))
    assert {model.model_id for model in models} <= set(told_models)
    assert [one.dataset.name for one in found.inputs.dataset_inputs] == ["validation"]


def test_trouble_of_every_kind_loses_nothing_and_tells_nothing_twice(uri: str) -> None:
    with door(uri) as before:

        def mood(kind: str) -> Callable[[], None]:
            def change() -> None:
                before.mood = kind
                before.turns_away(2)

            return change

        def serve() -> None:
            before.mood = "serves"

        trouble = {5: mood("500"), 15: mood("deaf"), 25: mood("away"), _STEPS + 1: serve}
        run = train(0, _STEPS, trouble)
        assert mlflow.MlflowClient(uri).get_run(str(run.run_id)).info.status == "FINISHED"
    check_whole(uri, run.run_id)


def test_a_server_that_comes_after_the_training_has_all_of_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer to the request that makes the run is lost too: there is one run all the same."""
    monkeypatch.setattr(tracking.step._Process, "run", None)
    with door(uri) as before:
        before.mood = "away"

        def deaf() -> None:
            assert tracking.run_id_of_process() is None
            before.mood = "deaf"
            before.turns_away(6)

        def serve() -> None:
            before.mood = "serves"

        os.environ["MLFLOW_EXPERIMENT_NAME"] = "outage from the start"
        run = train(0, _STEPS, {20: deaf, _STEPS + 1: serve})
    check_whole(uri, run.run_id)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("outage from the start")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A database that outlives its server, and what the server is given to open it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/mlflow.db", {}
        return
    password = secrets.token_hex(8)
    with postgres(password) as port:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow", {"PGPASSWORD": password}


def test_a_server_that_is_killed_and_started_again(
    store: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the training too, while the server is away: it goes on from a checkpoint."""
    monkeypatch.setattr(tracking.run, "_LAST_SECONDS", {"KILLED": 0.1})
    (database, variables), port = store, free_port()
    os.environ |= {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "KFP_RUN_ID": "killed",
    }
    with ExitStack() as servers:

        def serve() -> Server:
            return servers.enter_context(served(database, tmp_path, port, **variables))

        server = serve()
        with suppress(Interrupted):
            train(0, 25, {12: server.kill}, stop=True)
        again = serve()
        run = train(20, _STEPS, {33: again.kill, _STEPS + 1: serve})
        check_whole(again.uri, run.run_id)
        found = mlflow.MlflowClient(again.uri).get_run(str(run.run_id))
        assert found.info.status == "FINISHED"
        assert tracking.RESUMED_TAG not in found.data.tags  # it is the same run
