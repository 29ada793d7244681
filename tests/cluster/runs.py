"""Runs on the server: started by the project's own commands, read from KFP's answers themselves.

What `status` makes of an answer is not asked: a fault in it would hide one of the cluster.
"""

from __future__ import annotations

import io
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipelines.__main__ import _parser, main
from pipelines.cluster.client import TIMEOUT_SECONDS
from pipelines.cluster.server import Server
from pipelines.commands.cluster import connection
from tests.cluster.settings import Settings
from tests.cluster.table import Failed

STEPS = (
    "prepare-data",
    "prepare-teacher",
    "convert-student",
    "distil-student",
    "evaluate",
    "export-student",
)
FIRST = "check-recipe"
ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
# Nodes of KFP and Argo that are no step; `(N)` is an attempt or an iteration.
_INNER = re.compile(
    r".*\(.*\)|root|executor|.*-driver|iteration-.*|.*-[bcdfghjklmnpqrstvwxz2456789]{5}"
)
_ATTEMPT = re.compile(r"executor\((\d+)\)")


@dataclass
class Run:
    """A run; `details` is KFP's last answer."""

    run_id: str
    began: float = field(default_factory=time.monotonic)
    details: Any = None

    @property
    def state(self) -> str:
        return (self.details.state if self.details else None) or "PENDING"

    @property
    def _tasks(self) -> list[Any]:
        run_details = self.details.run_details if self.details else None
        return [t for t in (run_details and run_details.task_details) or [] if t.display_name]

    def steps(self) -> dict[str, str]:
        """State by step, of those that have one."""
        shown = [t for t in self._tasks if t.state and not _INNER.fullmatch(t.display_name)]
        return {_plain(task.display_name): task.state for task in shown}

    def named(self, step: str) -> list[str]:
        """States of all tasks of this name: one a variant."""
        return [t.state for t in self._tasks if _plain(t.display_name) == step and t.state]

    def executors(self) -> list[str]:
        """States of the steps' pods, attempts not counted apart; SKIPPED means cached."""
        return [t.state for t in self._tasks if t.display_name == "executor" and t.state]

    def attempts(self) -> list[tuple[int, str]]:
        """Number and state of every pod of a step that was started."""
        found = [(_ATTEMPT.fullmatch(t.display_name), t.state) for t in self._tasks]
        return [(int(match[1]), state) for match, state in found if match and state]

    def pod_seconds(self) -> float:
        """Time of the longest pod of a step."""
        pods = [t for t in self._tasks if _ATTEMPT.fullmatch(t.display_name)]
        return max((_seconds(t.start_time, t.end_time) for t in pods), default=0.0)


def _plain(name: str) -> str:
    """The training's name, in the step's pod or in a TrainJob's."""
    return name.removesuffix("-on-nodes")


def _seconds(start: datetime | None, end: datetime | None) -> float:
    return 0.0 if start is None or end is None else max(0.0, (end - start).total_seconds())


class Runs:
    """The server, and what was started there."""

    def __init__(self, settings: Settings, pause_seconds: float = 5.0) -> None:
        self.settings = settings
        self.pause_seconds = pause_seconds
        self.deadline = time.monotonic() + 60 * settings.minutes
        self.server = Server(connection(_parser().parse_args(["status", "none"])))
        self.started: list[Run] = []

    @property
    def place(self) -> tuple[str, ...]:
        """Options that say where on the server what belongs to this go is kept."""
        name = self.settings.name
        return (
            f"--platform={self.settings.platform}",
            f"--pipeline-name={name}",
            f"--experiment-name={name}",
        )

    def command(self, *words: str) -> str:
        """Do one of the project's commands; gives what it printed."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([*words])
        if code:
            last = (err.getvalue().strip() or out.getvalue().strip()).splitlines()[-1:]
            raise Failed(f"{words[0]} ended with {code}: {' '.join(last)}")
        return out.getvalue()

    def submit(self, what: str, *options: str) -> Run:
        """Start a run of this go's recipe."""
        settings = self.settings
        printed = self.command(
            "submit",
            *settings.recipe,
            *self.place,
            f"--run-name={settings.name} {what}",
            *options,
        )
        found = re.search(r"^run (\S+)$", printed, re.MULTILINE)
        if found is None:
            raise Failed(f"submit printed no run: {printed!r}")
        return self.add(found[1])

    def start_as_the_ui_does(self, what: str, like: Run, parameters: dict[str, Any]) -> Run:
        """Start a run of the same version past the checks of `submit`."""
        of = like.details.pipeline_version_reference
        made = self.server.write(
            f"starting {what}",
            lambda: self.server.client.run_pipeline(
                experiment_id=like.details.experiment_id,
                job_name=f"{self.settings.name} {what}",
                params=parameters,
                pipeline_id=of.pipeline_id,
                version_id=of.pipeline_version_id,
            ),
        )
        return self.add(str(made.run_id))

    def add(self, run_id: str) -> Run:
        """Note a run as one of this go's."""
        self.started.append(Run(run_id))
        return self.look(self.started[-1])

    def look(self, run: Run) -> Run:
        """Ask for the run's state."""
        api = self.server.client.runs
        run.details = self.server.read(
            f"run {run.run_id}",
            lambda: api.run_service_get_run(run.run_id, _request_timeout=TIMEOUT_SECONDS),
        )
        return run

    def pause(self, doing: str) -> None:
        """Wait a moment.

        Raises:
            Failed: there is no time left.
        """
        if time.monotonic() > self.deadline:
            raise Failed(f"{doing}: not within {self.settings.minutes:g} minutes (MINUTES=...)")
        time.sleep(self.pause_seconds)

    def wait(self, run: Run) -> Run:
        """Wait for the run's end, whichever it is."""
        while self.look(run).state not in ENDED:
            self.pause(f"run {run.run_id} is {run.state}, steps {run.steps()}")
        return run

    def succeed(self, run: Run) -> Run:
        """Wait for the run's end.

        Raises:
            Failed: it did not succeed.
        """
        if self.wait(run).state != "SUCCEEDED":
            bad = [name for name, state in run.steps().items() if state == "FAILED"]
            raise Failed(
                f"the run {run.state}: {', '.join(bad) or 'no step'} failed; {self.url(run)}"
            )
        return run

    def url(self, run: Run) -> str:
        """The run's page."""
        return self.server.url("runs", "details", run.run_id)
