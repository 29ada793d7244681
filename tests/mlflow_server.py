"""A real `mlflow server` of a test's own."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass
class Server:
    """A `mlflow server`."""

    uri: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """As a machine that is switched off."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()  # first, and its children before theirs: who lives starts new ones
        for child in children:
            child.kill()
        psutil.wait_procs(children)
        self.process.wait()


@contextmanager
def served(store: str, folder: Path, port: int, **variables: str) -> Iterator[Server]:
    """A tracking server while the body runs, and until it has answered before."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port)]
    command += ["--backend-store-uri", store, "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    quick = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **variables}
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, env=quick, stdout=null, stderr=null)
    server = Server(f"http://127.0.0.1:{port}", process)
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{server.uri}/health", timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    try:
        yield server
    finally:
        process.terminate()
        process.wait(timeout=120)
