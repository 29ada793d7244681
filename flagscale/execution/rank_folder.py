"""The folder through which a step and its ranks speak: what to do, how it ended, what went wrong.

    request.json      arguments of the function that every rank calls
    result.json       what the first rank's call returned, and the id of its run in MLflow
    heartbeat         of a launcher on another machine (`flagscale.execution.heartbeat`)
    0/, 1/, ...       one a rank: its process, its error, its exit code if it failed
    logs/             one folder a node: torchrun's, with the output of its ranks

It works on one machine, and on several that share a file system.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from flagscale import tracking
from flagscale.artifacts import write_json
from flagscale.errors import Interrupted, UserError
from flagscale.execution.notes import FOLDER_VARIABLE, note_error, read_error
from flagscale.execution.step_process import EXIT_ERROR, EXIT_INTERRUPTED

EXIT_KILLED = 137  # of a rank that could not say how it ended
_EXIT_CODE = "exit-code"
_ENDED = "ended-well"
_POLL_SECONDS = 0.5


class LostError(UserError):
    """Ranks ended that had done nothing wrong: their node was drained or lost, or they were killed.

    Started anew, they go on from the last checkpoint.
    """


class RankFolder:
    """The folder of one start of the ranks."""

    def __init__(self, path: Path) -> None:
        """Use `path`, which `create` has made."""
        self.path = path

    @classmethod
    def create(cls, path: Path, request: dict[str, Any]) -> RankFolder:
        """Make the folder.

        Args:
            path: does not exist yet, or is empty.
            request: keyword arguments of what the ranks call, JSON values.
        """
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "request.json", request)
        return cls(path)

    def request(self) -> dict[str, Any]:
        """What `create` was given."""
        values: dict[str, Any] = json.loads(
            (self.path / "request.json").read_text(encoding="utf-8")
        )
        return values

    def join(self, rank: int) -> Path:
        """The folder of a rank that starts; its notes go there from now on.

        Raises:
            SystemExit: it started before: Kubernetes starts a pod anew that failed or was killed.
                The others cannot go on with it; the first end stays the one that counts.
        """
        mine = self.path / str(rank)
        os.environ[FOLDER_VARIABLE] = str(mine)
        try:
            mine.mkdir()
        except FileExistsError:
            if (mine / _EXIT_CODE).exists():
                raise SystemExit(_read_code(mine)) from None
            note_error("launch", f"rank {rank} was killed, and started anew")
            self.note_exit(mine, EXIT_KILLED)
            raise SystemExit(EXIT_KILLED) from None
        return mine

    def note_exit(self, rank: Path, code: Any) -> None:  # noqa: ANN401 - SystemExit's
        """Say that a rank failed, or was stopped."""
        write_json(rank / _EXIT_CODE, code)

    def note_end(self, rank: Path) -> None:
        """Say that a rank has done its work."""
        (rank / _ENDED).touch()

    def note_result(self, result: Any) -> None:  # noqa: ANN401 - any JSON value
        """Say what the first rank's call returned, and in which run MLflow has it."""
        told = {"returned": result, "mlflow_run_id": tracking.run_id_of_process()}
        write_json(self.path / "result.json", told)

    def ranks(self) -> list[Path]:
        """The folders of the ranks that have started."""
        return [path for path in self.path.iterdir() if path.name.isdecimal()]

    def exits(self) -> dict[Path, int]:
        """Rank's folder -> exit code of each that failed or was stopped, the first one first."""
        found = sorted(self.path.glob(f"*/{_EXIT_CODE}"), key=lambda path: path.stat().st_mtime_ns)
        return {path.parent: _read_code(path.parent) for path in found}

    def failed(self) -> list[Path]:
        """The folders of ranks that failed, the first one first, then of those that were killed.

        To be asked when all have ended, and not all well: one that left no word was killed.
        """
        exits = self.exits()
        silent = {rank for rank in self.ranks() if not (rank / _ENDED).exists()} - {*exits}
        failed = [rank for rank, code in exits.items() if code != EXIT_INTERRUPTED]
        return failed + sorted(silent, key=lambda rank: int(rank.name))

    def result(self, patience_seconds: float = 0.0) -> Any:  # noqa: ANN401 - any JSON value
        """What the first rank returned; its run in MLflow becomes this process's.

        Args:
            patience_seconds: a network file system may show a new file late.

        Raises:
            FileNotFoundError: it left no result.
        """
        path, deadline = self.path / "result.json", time.monotonic() + patience_seconds
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        told = json.loads(path.read_text(encoding="utf-8"))
        tracking.note_run_of_ranks(told["mlflow_run_id"])
        return told["returned"]

    def raise_error(self, stopped: bool, otherwise: str, lost: bool = False) -> None:
        """Raise why the ranks failed.

        Args:
            stopped: whether they were asked to stop.
            otherwise: the message if no rank has said why, or if they were lost.
            lost: whether one is known to be lost, whatever the others say because of that.

        Raises:
            Interrupted: they were asked to stop, and have.
            LostError: a rank was stopped from outside, killed or lost.
            UserError: the message of the first rank to fail, or `otherwise`.
        """
        exits = self.exits()
        interrupted = [rank for rank, code in exits.items() if code == EXIT_INTERRUPTED]
        if stopped and len(interrupted) == len(exits):
            message = read_error(interrupted[0]) if interrupted else None
            raise Interrupted((message or "stopped by a signal").removeprefix("interrupted: "))
        if interrupted and len(interrupted) == len(self.ranks()):
            told = (read_error(interrupted[0]) or "").removeprefix("interrupted: ")
            raise LostError(f"stopped from outside, e.g. because a node is drained: {told}")
        if lost:
            raise LostError(otherwise)
        # A rank that is stopped because of another's error is not the one to ask.
        failed = [rank for rank in exits if rank not in interrupted]
        message = read_error(failed[0]) if failed else None
        if failed and exits[failed[0]] == EXIT_KILLED:
            raise LostError(message or otherwise)
        raise UserError(message or otherwise)


def _read_code(rank: Path) -> int:
    """SystemExit's code may be anything; what is no number is an error."""
    code = json.loads((rank / _EXIT_CODE).read_text(encoding="utf-8"))
    return code if isinstance(code, int) else EXIT_ERROR
