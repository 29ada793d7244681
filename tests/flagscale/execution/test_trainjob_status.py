"""What Trainer is told of a training, over HTTP as its own server takes it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from kubeflow.trainer.backends.kubernetes import utils as sdk
from kubeflow_trainer_api import models

from flagscale.execution.trainjob import status
from flagscale.execution.trainjob.status import TrainJobStatus
from flagscale.recipe import TrainingRecipe
from flagscale.steps.training.observers import observer
from flagscale.tracking import StepRun
from flagscale.train.checkpoints import TrainingState

PATIENCE = 300  # seconds: far more than is needed, on a machine with much else to do
PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/kubeflow/trainjobs/j/status"
RECORD = {
    "total loss": 1.5,
    "logits distillation loss": 1.25,
    "lm loss": 3.0,
    "learning rate": 1e-4,
    "grad norm": 0.5,
    "tokens per second": 100.0,
}


class Controller:
    """Trainer's: answers with `code`, once it is `open`.

    Attributes:
        told: the statuses, in order.
        came: set when a request has come.
    """

    def __init__(self) -> None:
        self.code = 200
        self.told: list[models.TrainerV1alpha1TrainerStatus] = []
        self.came, self.open = threading.Event(), threading.Event()
        self.open.set()
        controller = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_POST(self) -> None:
                assert self.path == PATH
                assert self.headers["Authorization"] == "Bearer a-token"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = models.TrainerV1alpha1UpdateTrainJobStatusRequest.from_dict(body)
                assert request.to_dict().keys() == body.keys()
                controller.told.append(request.trainer_status)
                controller.came.set()
                controller.open.wait(PATIENCE)
                self.send_response(controller.code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def controller(monkeypatch, tmp_path) -> Iterator[Controller]:
    found = Controller()
    (tmp_path / "token").write_text("a-token\n")
    url = f"http://127.0.0.1:{found.server.server_port}{PATH}"
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", url)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    monkeypatch.setattr(status, "_SECONDS_BETWEEN", 0.01)
    monkeypatch.setattr(status, "_END_SECONDS", PATIENCE)
    monkeypatch.setattr(sdk, "_MIN_UPDATE_INTERVAL_SECONDS", 0.0)
    yield found
    found.open.set()
    found.server.shutdown()


def train(steps: int, first: int = 0) -> None:
    state = TrainingState(step=first)
    training = TrainingRecipe(train_iters=steps, lr=0.1)
    with observer(StepRun(None), state, training, steps) as told:
        for step in range(first + 1, steps + 1):
            told.trained({"step": step, **RECORD, "lm loss": 3.0 - step / 10})
        told.validated({"step": steps, "lm loss": 2.5})


def test_percent_time_left_and_losses(controller):
    train(steps=8)
    last = controller.told[-1]
    assert last.progress_percentage == 100
    assert last.estimated_remaining_seconds == 0
    figures = {one.name: float(one.value) for one in last.metrics}
    assert figures == {
        "step": 8.0,
        **{f"train/{name}": value for name, value in RECORD.items()},
        "train/lm loss": 2.2,
        "validation/lm loss": 2.5,
    }


def test_a_training_that_is_half_done(controller):
    with TrainJobStatus() as told:
        told.tell(3, 8, 125.4, {"train/lm loss": 3.0})
        assert controller.came.wait(PATIENCE)
    assert controller.told[0].progress_percentage == 37
    assert controller.told[0].estimated_remaining_seconds == 125


def test_a_server_that_does_not_answer_holds_no_step_up(controller):
    """All steps are taken while the first request still waits for its answer."""
    controller.open.clear()
    with TrainJobStatus() as told:
        told.tell(1, 100, None, {})
        assert controller.came.wait(PATIENCE)
        for step in range(2, 101):
            told.tell(step, 100, None, {})
        assert len(controller.told) == 1
        controller.open.set()
    assert [one.progress_percentage for one in controller.told] == [1, 100]


@pytest.mark.parametrize("code", [403, 500])
def test_a_server_that_refuses_is_told_of_once(controller, caplog, code, monkeypatch):
    monkeypatch.setattr(status, "_SECONDS_AFTER_FAILURE", 0.01)
    controller.code = code
    with TrainJobStatus() as told:
        for step in range(1, 4):
            controller.came.clear()
            told.tell(step, 4, None, {})
            assert controller.came.wait(PATIENCE)
        controller.code = 200
    warnings = [one for one in caplog.records if one.levelname == "WARNING"]
    assert [one.getMessage() for one in warnings] == [
        "Trainer did not take how far the training is; going on"
    ]


def test_where_trainer_does_not_ask_nobody_is_told(controller, monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL")
    before = threading.active_count()
    with TrainJobStatus() as told:
        told.tell(1, 2, None, {})
        assert threading.active_count() == before
    assert not controller.told
