"""Runs of tiny recipes, as processes and in containers, and what was seen of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from engine import ROOT, Engine
from servers import PostgreSQL

from flagscale.execution.notes import read_process

TRAINED = "distil-student"


@dataclass
class Runs:
    """`python -m pipelines run` of a recipe, in one folder of runs."""

    folder: Path
    sets: tuple[str, ...]
    environment: dict[str, str]
    image: str | None = None
    recipe: str = "recipes/tiny.yaml"
    outputs: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipelines", "run", self.recipe]
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
        output, _ = process.communicate(timeout=1500)
        self.outputs.append(output)
        return process.returncode

    def wait_for_checkpoint(
        self, process: subprocess.Popen[str], step: str = TRAINED
    ) -> psutil.Process:
        """The training's process, once it has saved a checkpoint."""
        notes, begin = self.folder / "latest" / "steps" / step, time.time()
        # `latest` may be the run before, still.
        began = self._wait(process, begin, lambda: [notes / "process.json"])
        checkpoints = self.folder / "checkpoints"
        self._wait(process, began, lambda: checkpoints.glob("*/*/latest.json"))
        noted = read_process(notes)
        assert noted
        return psutil.Process(int(noted.split(":")[0]))

    def _wait(
        self, process: subprocess.Popen[str], since: float, files: Callable[[], Iterable[Path]]
    ) -> float:
        """Until one of the files has been written since a time; gives back when."""
        deadline = time.monotonic() + 900
        while True:
            written = [path.stat().st_mtime for path in files() if path.exists()]
            if max(written, default=0.0) > since:
                return max(written)
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)

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
