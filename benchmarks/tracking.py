"""What tracking costs a training: 1,000 steps beside the step time of the default recipe.

    python benchmarks/tracking.py [--step-seconds 1.9] [--uri URI]

A training of 1,000 steps tells MLflow what the default recipe's tells it (five figures a step, a
validation and a checkpoint every 30, the machine every 10 s), to a real `mlflow server` on SQLite
of its own (or to URI), which is served, away, silent and answering 500 in turn. A step here lasts
0.05 s, and every wait of the tracking is shorter by as much (between batches, samples, attempts),
so that there are as many of them a step as there are in a real training. Shown are the time that
the training's thread spends in its calls and the longest of them (beside it, by how much a mere
sleep of the same loop was late at most: that is the machine's), and the processor time a step of
the whole process (the sending and the sampling thread's too) beyond that of a loop that only waits;
and once, what it takes to begin (MLflow's import) and to end. The goal: under 1% of a step, and no
call of more than a second, whatever the server does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STEPS = 1000
_PACE_SECONDS = 0.05  # of a step here


@dataclass
class Cost:
    """Of a training's tracking, in seconds.

    Attributes:
        calls: in which the training waited.
        longest: of these.
        late: by which the longest of the loop's own sleeps was longer than it should be: what other
            work on the machine does to any call.
        begin: of the processor, until the first step.
        steps: of the processor, meanwhile, beyond that of a loop which only waits.
        end: of the processor, after the last step.
    """

    calls: float = 0.0
    longest: float = 0.0
    late: float = 0.0
    begin: float = 0.0
    steps: float = 0.0
    end: float = 0.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-seconds", type=float, default=1.9, help="of the default recipe")
    parser.add_argument("--uri", help="of a tracking server; default: one of its own")
    given = parser.parse_args()
    os.environ |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_EXPERIMENT_NAME": "tracking",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    logging.disable()
    _shorten(_PACE_SECONDS / given.step_seconds)
    with served(given.uri) as uri, silent() as deaf, troubled() as trouble:
        print("| server | calls, ms a step | longest, s | a sleep's, s", end=" ")
        print("| processor, ms a step | share | once |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        servers = {"serves": uri, "away": "http://127.0.0.1:9", "silent": deaf, "500": trouble}
        for name, one in servers.items():
            cost = measure(one)
            share = (cost.calls + cost.steps) / STEPS / given.step_seconds
            once = f"{cost.begin:.1f} + {cost.end:.1f} s"
            each = f"{1e3 * cost.calls / STEPS:.3f} | {cost.longest:.3f} | {cost.late:.3f}"
            print(f"| {name} | {each} | {1e3 * cost.steps / STEPS:.2f} | {share:.2%} | {once} |")


def _shorten(share: float) -> None:
    """Let every wait of the tracking last this share of itself."""
    from flagscale.tracking import delivery, outbox

    machine: Any = importlib.import_module("flagscale.tracking.system_metrics")
    outbox._BATCH_SECONDS *= share
    machine._FIRST_SECONDS *= share
    delivery._FIRST_PAUSE *= share
    delivery._LONGEST_PAUSE *= share
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1"  # whole seconds
    os.environ["MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"] = "0"


def measure(uri: str) -> Cost:
    """A training's tracking by this server."""
    from flagscale import tracking
    from flagscale.recipe import TrainingRecipe
    from flagscale.tracking.delivery import Patience

    os.environ["MLFLOW_TRACKING_URI"] = uri
    Patience.left = 0.5  # at the end
    training = TrainingRecipe(train_iters=STEPS, lr=1e-4, eval_interval=30)
    losses = {"logits distillation loss": 1.0, "lm loss": 2.0}
    others = {"learning rate": 1e-4, "grad norm": 1.0, "tokens per second": 130.0}
    cost, idle, begun = Cost(), _idle(), time.process_time()
    with tracking.step_run("distil-student", {}) as run, tracking.system_metrics(run):
        told = tracking.TrackedTraining(run, training, None)
        first = time.process_time()
        for step in range(1, STEPS + 1):
            asleep = time.perf_counter()
            time.sleep(_PACE_SECONDS)
            called = time.perf_counter()
            cost.late = max(cost.late, called - asleep - _PACE_SECONDS)
            told.trained({"step": float(step), **losses, **others})
            if step % training.eval_interval == 0:
                told.validated({"step": float(step), **losses})
                names = (step - 2 * training.eval_interval, step - training.eval_interval, step)
                told.kept([Path(f"/there/step-{i:08d}") for i in names if i > 0])
            spent = time.perf_counter() - called
            cost.calls, cost.longest = cost.calls + spent, max(cost.longest, spent)
        last = time.process_time()
    cost.begin, cost.steps, cost.end = (
        first - begun,
        last - first - idle,
        time.process_time() - last,
    )
    return cost


def _idle() -> float:
    """Processor seconds of as many steps that only wait."""
    begun = time.process_time()
    for _ in range(STEPS // 10):
        time.sleep(_PACE_SECONDS)
    return 10 * (time.process_time() - begun)


@contextmanager
def served(uri: str | None) -> Iterator[str]:
    """A server of one's own, unless there is one."""
    if uri:
        yield uri
        return
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{folder}/artifacts"]
        null = subprocess.DEVNULL
        server = subprocess.Popen(command, stdout=null, stderr=null)  # noqa: S603
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    if server.poll() is not None:
                        raise
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


@contextmanager
def silent() -> Iterator[str]:
    """Takes connections and never answers."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def troubled() -> Iterator[str]:
    """Answers 500."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Trouble) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _Trouble(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        with contextlib.suppress(OSError):  # who asked may have lost patience
            self.send_error(500)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    main()
