"""The same recipe on this machine, beside the cluster: what its figures are compared with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.figures import Tracking
from tests.cluster.settings import ROOT, TEACHER, Settings
from tests.cluster.table import Failed


class LocalRun:
    """`python -m pipelines run`, in a folder of its own and without the cluster's MLflow."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        teacher = settings.teacher
        if teacher.startswith("/") and not Path(teacher).is_dir():  # a folder that only pods see
            teacher = str(TEACHER)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        command = [sys.executable, "-m", "pipelines", "run", *settings.changed(teacher)]
        self.tracking = Tracking(f"sqlite:///{folder}/mlflow.db", settings.name)
        self.process = subprocess.Popen(
            [*command, "--runs", str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, seconds: float) -> Tracking:
        """Wait for its end; gives where its figures are.

        Raises:
            Failed: it failed, or takes longer.
        """
        try:
            output, _ = self.process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            raise Failed("the run on this machine has not ended") from None
        if self.process.returncode:
            last = output.strip().splitlines()[-1:]
            raise Failed(f"the run on this machine: {' '.join(last)}")
        return self.tracking

    def stop(self) -> None:
        """End it, if it goes on."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.communicate()
