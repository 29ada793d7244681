"""The notes that a step's process leaves for whoever started it.

They see each other only through environment variables and small files: which process a step is,
with which error it ended, where its run in MLflow and its log are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from flagscale.artifacts import write_json
from flagscale.processes import this_process
from flagscale.secrets import mask

FOLDER_VARIABLE = "FLAGSCALE_STEP_FOLDER"  # where a step leaves its notes, if set
REQUEST_VARIABLE = "FLAGSCALE_REQUEST"  # the folder of a step's ranks
LOGS = "logs"  # in that: a folder a node


def note_process() -> None:
    """Tell the runner which process this step is."""
    _note("process.json", {"process": this_process()})


def note_error(step: str, message: str) -> None:
    """Tell the runner why this step ends."""
    _note("error.json", {"step": step, "message": mask(message)})


def note_run(run_id: str | None) -> None:
    """Tell whoever started this process which run in MLflow is its own."""
    if run_id is not None:
        _note("run.json", {"mlflow_run_id": run_id})


def note_log(path: str) -> None:
    """Tell where this process's output goes."""
    _note("log.json", {"log": path})


def read_run(folder: Path) -> str | None:
    """What `note_run` left, None if nothing."""
    return _read(folder / "run.json", "mlflow_run_id")


def read_log(folder: Path) -> Path | None:
    """The file of `note_log`, None if there is none."""
    found = _read(folder / "log.json", "log")
    return Path(found) if found is not None and Path(found).is_file() else None


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
