"""Runs of the tiny recipe, as processes and in containers, and what was seen of them."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from engine import ROOT, Engine
from servers import PostgreSQL

from flagscale.execution.notes import read_process

TRAINED = "distil-student"


@dataclass
class Runs:
    """`python -m pipelines run` of the tiny recipe, in one folder of runs."""

    folder: Path
    sets: tuple[str, ...]
    environment: dict[str, str]
    image: str | None = None
    outputs: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipelines", "run", "recipes/tiny.yaml"]
        command += ["--runs", str(self.folder), *(f"--set={text}" for text in self.sets)]
        if self.image is not None:
            command += ["--image", self.image]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, process: subprocess.Popen[str]) -> int:
        output, _ = process.communicate(timeout=540)
        self.outputs.append(output)
        return process.returncode

    def wait_for_checkpoint(self, process: subprocess.Popen[str]) -> psutil.Process:
        """The training's process, once it has saved a checkpoint."""
        notes, begin = self.folder / "latest" / "steps" / TRAINED, time.time()
        deadline = time.monotonic() + 300
        while True:
            found = list((self.folder / "checkpoints").glob("*/*/latest.json"))
            if any(path.stat().st_mtime > begin for path in found):
                break
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        noted = read_process(notes)
        assert noted
        return psutil.Process(int(noted.split(":")[0]))

    def output(self, name: str) -> Path:
        return (self.folder / "latest" / name).resolve()


@dataclass
class Containers(Runs):
    """Runs in containers, and what was seen of one of them while it worked."""

    engine: Engine | None = None
    exits: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    user: tuple[int, int] = (0, 0)
    status: str = ""
    attempts_to_write: dict[str, tuple[int, str]] = field(default_factory=dict)

    def steps(self) -> list:
        """Containers of steps, ended ones too."""
        assert self.engine
        filters = {"label": "flagscale.runner"}
        return self.engine.client().containers.list(all=True, filters=filters)

    def look_at(self, process: psutil.Process) -> None:
        self.user = (process.uids().real, process.gids().real)
        self.status = Path(f"/proc/{process.pid}/status").read_text()
        (container,) = self.steps()
        for path in ("/x", "/opt/venv/x", "/etc/passwd", self.sets[0].partition("=")[2] + "/x"):
            result = container.exec_run(["sh", "-c", f"echo x >> {path}"], user="0")
            self.attempts_to_write[path] = (result.exit_code, result.output.decode())


@dataclass
class Tracking:
    """The MLflow server: its address for people with the password, its database and artifacts."""

    uri: str
    database: PostgreSQL
    artifacts: Path
