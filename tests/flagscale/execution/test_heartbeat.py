"""The rank's side of the heartbeat, in a process of its own: it ends by SIGTERM, or lives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT = 1.0
PATIENCE = 300  # seconds: far more than is needed, on a machine with much else to do
RANK = """
import sys, time
from pathlib import Path
from flagscale.execution.heartbeat import heed
heed(Path(sys.argv[1]))
print("listens", flush=True)
time.sleep(600)
"""


def rank(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "FLAGSCALE_HEARTBEAT_SECONDS": str(LIMIT)}
    command = [sys.executable, "-c", RANK, str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "listens\n"
    return process


def test_a_silent_launcher_ends_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text("1")
    begin = time.monotonic()
    assert rank(tmp_path).wait(timeout=PATIENCE) == -signal.SIGTERM
    assert time.monotonic() - begin > LIMIT


def test_a_volume_that_stalls_ends_no_training(tmp_path: Path) -> None:
    """Reading a pipe hangs until somebody writes, as reading a volume does that is away."""
    pipe = tmp_path / "heartbeat"
    os.mkfifo(pipe)
    process = rank(tmp_path)
    for text in ("1", "1", "2"):  # the look that hung shows what stood there before
        pipe.write_text(text)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2 * LIMIT)
    pipe.write_text("stop")
    assert process.wait(timeout=PATIENCE) == -signal.SIGTERM
