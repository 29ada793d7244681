"""Processes of steps: who they are, and the notes that they leave for the runner.

The runner on this machine and the steps that it starts see each other only through environment
variables and two small files: which process a step is, and with which error it ended.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil

from flagscale.artifacts import write_json
from flagscale.secrets import mask

FOLDER_VARIABLE = "FLAGSCALE_STEP_FOLDER"  # where a step leaves its notes, if set
RUNNER_VARIABLE = "FLAGSCALE_RUNNER"  # the runner's `this_process()`: a step ends with its runner


def this_process() -> str:
    """`<pid>:<start time>`: stays right when the system gives the number to another process."""
    return f"{os.getpid()}:{psutil.Process().create_time():.0f}"


def is_alive(process: str) -> bool:
    """Whether the process that `this_process` named still runs on this machine."""
    pid, started = process.split(":")
    try:
        found = psutil.Process(int(pid))
        same = abs(found.create_time() - float(started)) < 2
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def note_process() -> None:
    """Tell the runner which process this step is."""
    _note("process.json", {"process": this_process()})


def note_error(step: str, message: str) -> None:
    """Tell the runner why this step ends."""
    _note("error.json", {"step": step, "message": mask(message)})


def read_process(folder: Path) -> str | None:
    """What `note_process` left, None if nothing."""
    return _read(folder / "process.json", "process")


def read_error(folder: Path) -> str | None:
    """The message that `note_error` left, None if there is none (e.g. killed with -9)."""
    return _read(folder / "error.json", "message")


def _note(file: str, value: dict[str, str]) -> None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        write_json(Path(folder) / file, value)


def _read(path: Path, key: str) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[key])
    except FileNotFoundError:
        return None
