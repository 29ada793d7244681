"""The notes that a step's process leaves for whoever started it.

They see each other only through environment variables and two small files: which process a step
is, and with which error it ended.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from flagscale.artifacts import write_json
from flagscale.processes import this_process
from flagscale.secrets import mask

FOLDER_VARIABLE = "FLAGSCALE_STEP_FOLDER"  # where a step leaves its notes, if set


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
