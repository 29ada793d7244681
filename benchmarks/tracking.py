"""What tracking costs a training: 1,000 steps beside the step time of the default recipe.

    python benchmarks/tracking.py [--step-seconds 1.9] [--uri URI]

A training of 1,000 steps tells MLflow what the default recipe's tells it, to a real `mlflow server`
on SQLite of its own (or to URI), which is served, away, and silent in turn. Shown are the time that
the training's thread spends in its calls and the longest of them, and the processor time of the
whole process (the sending thread's too), a step. The goal: under 1% of a step, and no call of more
than a second, whatever the server does.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

STEPS = 1000
_PACE_SECONDS = 0.02  # of a step here: what is measured does not depend on it


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-seconds", type=float, default=1.9, help="of the default recipe")
    parser.add_argument("--uri", help="of a tracking server; default: one of its own")
    given = parser.parse_args()
    os.environ |= {"MLFLOW_EXPERIMENT_NAME": "tracking", "MLFLOW_DISABLE_TELEMETRY": "true"}
    print("| server | calls, ms a step | longest call, s | processor, ms a step | of a step |")
    print("|---|---|---|---|---|")
    with served(given.uri) as uri, silent() as deaf:
        for name, one in (("serves", uri), ("away", "http://127.0.0.1:9"), ("silent", deaf)):
            calls, longest, processor = measure(one)
            share = processor / STEPS / given.step_seconds
            told = (f"{1e3 * calls / STEPS:.3f}", f"{longest:.3f}")
            print(f"| {name} | {' | '.join(told)} | {1e3 * processor / STEPS:.2f} | {share:.2%} |")


def measure(uri: str) -> tuple[float, float, float]:
    """Seconds in calls, in the longest of them, and of the processor beside a loop without any."""
    from flagscale import tracking
    from flagscale.recipe import TrainingRecipe
    from flagscale.tracking.delivery import Patience

    os.environ["MLFLOW_TRACKING_URI"] = uri
    Patience.left = 0.5  # at the end
    training = TrainingRecipe(train_iters=STEPS, lr=1e-4, eval_interval=50)
    losses = {"logits distillation loss": 1.0, "lm loss": 2.0}
    others = {"learning rate": 1e-4, "grad norm": 1.0, "tokens per second": 130.0}
    total = longest = 0.0
    with tracking.step_run("distil-student", {}) as run, tracking.system_metrics(run):
        told = tracking.TrackedTraining(run, training, None)
        idle = _idle()
        processor = time.process_time()
        for step in range(1, STEPS + 1):
            time.sleep(_PACE_SECONDS)
            begun = time.perf_counter()
            told.trained({"step": float(step), **losses, **others})
            if step % training.eval_interval == 0:
                told.validated({"step": float(step), **losses})
                names = (step - 2 * training.eval_interval, step - training.eval_interval, step)
                told.kept([Path(f"/there/step-{i:08d}") for i in names if i > 0])
            spent = time.perf_counter() - begun
            total, longest = total + spent, max(longest, spent)
        processor = time.process_time() - processor - idle
    return total, longest, processor


def _idle() -> float:
    """Processor seconds of as many steps that only wait."""
    begun = time.process_time()
    for _ in range(STEPS // 10):
        time.sleep(_PACE_SECONDS / 10)
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


if __name__ == "__main__":
    main()
