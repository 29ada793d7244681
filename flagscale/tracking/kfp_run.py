"""The parent run of a KFP run's steps, on a cluster where KFP's MLflow plugin is off.

Nobody makes it for them: the steps are pods that know of one another only the KFP run's id. So the
first of them makes a run with that id as a tag, and the others find it. Each step tells it how
things stand, from its children: RUNNING, FAILED or KILLED as soon as a step is and while it is not
tried again, FINISHED when the pipeline's last step is.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flagscale import variables
from flagscale.tracking.names import (
    KFP_RUN_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    STARTED_TAG,
    WORK_TAG,
    here,
    metric_name,
    tag,
)
from flagscale.tracking.run import StepRun
from flagscale.tracking.server import children_of, find_run

if TYPE_CHECKING:
    from mlflow import MlflowClient


_SETTLE_SECONDS = 1.0  # longer than a request: who comes at the same time is seen after it


class KfpRun:
    """The parent.

    Attributes:
        client: of the tracking server.
        experiment_id: MLflow's id of the experiment.
        run_id: MLflow's id of the run.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        self.client, self.experiment_id, self.run_id = client, experiment_id, run_id

    @classmethod
    def find(cls, client: MlflowClient, experiment_id: str) -> KfpRun | None:
        """The oldest run of this KFP run's id, None if there is none yet."""
        found = client.search_runs([experiment_id], f"tags.`{KFP_RUN_TAG}` = '{_kfp_run_id()}'")
        if not found:
            return None
        oldest = min(found, key=lambda run: (run.info.start_time, run.info.run_id))
        return cls(client, experiment_id, oldest.info.run_id)

    @classmethod
    def find_or_make(cls, client: MlflowClient, experiment_id: str) -> KfpRun:
        """The same run for every step, also for those that come at the same time."""
        found = cls.find(client, experiment_id)
        if found is not None:
            return found
        name = tag(os.environ.get(variables.RUN_NAME) or _kfp_run_id())
        tags = {KFP_RUN_TAG: _kfp_run_id()}
        own = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        time.sleep(_SETTLE_SECONDS)
        oldest = cls.find(client, experiment_id)
        if oldest is None:  # deleted by somebody
            return cls(client, experiment_id, own)
        if oldest.run_id != own:
            client.delete_run(own)
        return oldest

    def children(self) -> list[Any]:
        """The steps' runs."""
        return children_of(self.client, self.experiment_id, self.run_id)

    def children_named(self, name: str) -> list[Any]:
        """The runs of one step."""
        return [run for run in self.children() if run.info.run_name == name]

    def show_children(self) -> None:
        """Set the status that follows from the steps'."""
        self.show(overall_status(self.children()))

    def show(self, status: str) -> None:
        """Set the status, if it is another one."""
        if self.client.get_run(self.run_id).info.status == status:
            return
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status)

    def settle(self, child: str, status: str) -> None:
        """Take note that a step has ended.

        Args:
            child: its run.
            status: its status.
        """
        oldest = self.find(self.client, self.experiment_id)
        if oldest is None:  # deleted by somebody
            return
        if oldest.run_id != self.run_id:  # a slow server showed one of two parents too late
            self.client.set_tag(child, PARENT_TAG, oldest.run_id)
            if find_run(self.client, self.run_id).info.lifecycle_stage == "active":
                self.client.delete_run(self.run_id)
            self.run_id = oldest.run_id
        if os.environ.get(variables.LAST_STEP) == "1" and status == "FINISHED":
            for run in self.children():
                # Killed with -9 before it was tried again, unless it is this process's own.
                if run.info.status == "RUNNING" and run.data.tags.get(PROCESS_TAG) != here():
                    self.client.set_terminated(run.info.run_id, "KILLED")
            self.show("FINISHED")
        else:
            self.show_children()


class KfpStep(StepRun):
    """A step's run below a `KfpRun`, which is kept up to date with it."""

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        parent: KfpRun,
        known: Mapping[str, set[int]] | None = None,
    ) -> None:
        super().__init__(client, run_id, known)
        self._parent = parent
        self._call("the pipeline's status", lambda _: parent.show_children())

    def log_headline(self, metrics: Mapping[str, float]) -> None:
        """See `StepRun`; the pipeline's run shows the last figures that any step gave it."""
        self.log_metrics(metrics)

        def send(client: MlflowClient) -> None:
            for name, value in metrics.items():
                client.log_metric(self._parent.run_id, metric_name(name), float(value))

        self._call("headline figures", send)

    def finish(self, status: str) -> None:
        """See `StepRun`."""
        super().finish(status)
        self._call("the pipeline's status", lambda _: self._parent.settle(self._id, status))


def in_kfp_without_plugin() -> bool:
    """Whether the steps have to find their parent themselves."""
    return bool(os.environ.get(variables.KFP_RUN)) and not os.environ.get("MLFLOW_RUN_ID")


def overall_status(children: Sequence[Any]) -> str:
    """How a pipeline stands whose last step has not ended well yet.

    Args:
        children: runs of its steps. A step's later run stands for the earlier ones of the same
            work; a failure of unknown work (before its recipe was read) is made good by any later
            run of the step.
    """
    standing: list[Any] = []
    for run in sorted(children, key=_started, reverse=True):
        work = run.data.tags.get(WORK_TAG)
        later = [one for one in standing if one.info.run_name == run.info.run_name]
        if not any(work is None or one.data.tags.get(WORK_TAG) == work for one in later):
            standing.append(run)
    statuses = {run.info.status for run in standing}
    return next((status for status in ("FAILED", "KILLED") if status in statuses), "RUNNING")


def _started(run: Any) -> int:  # noqa: ANN401 - mlflow's Run
    return int(run.data.tags.get(STARTED_TAG) or run.info.start_time)


def _kfp_run_id() -> str:
    return re.sub(r"[^\w.-]", "", os.environ[variables.KFP_RUN])
