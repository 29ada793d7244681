"""The parent run of a KFP run's steps, on a cluster where KFP's MLflow plugin is off.

Nobody makes it for them: the steps are pods that know of one another only the KFP run's id. So the
first of them makes a run with that id as a tag, and the others find it. Each step tells it how
things stand, from its children: RUNNING, FAILED or KILLED as soon as a step is and while it is not
tried again. The pipeline's last step, record-run, ends it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flagscale import variables
from flagscale.tracking.names import (
    KFP_RUN_TAG,
    NOTE_TAG,
    PARENT_TAG,
    STARTED_TAG,
    WORK_TAG,
    metric_name,
    own_kfp_run,
    tag,
)
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
        found = client.search_runs([experiment_id], f"tags.`{KFP_RUN_TAG}` = '{own_kfp_run()}'")
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
        kfp_run_id = own_kfp_run() or ""
        name = tag(os.environ.get(variables.RUN_NAME) or kfp_run_id)
        tags = {KFP_RUN_TAG: kfp_run_id}
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

    def settle(self, child: str) -> None:
        """Take note that a step has ended, whose run is `child`."""
        oldest = self.find(self.client, self.experiment_id)
        if oldest is None:  # deleted by somebody
            return
        if oldest.run_id != self.run_id:  # a slow server showed one of two parents too late
            self.client.set_tag(child, PARENT_TAG, oldest.run_id)
            if find_run(self.client, self.run_id).info.lifecycle_stage == "active":
                self.client.delete_run(self.run_id)
            self.run_id = oldest.run_id
        self.show_children()

    def finish(self) -> None:
        """Every step has ended well: end the run, and what a lost process left open below it."""
        end_open(self.client, self.children(), "FINISHED")
        self.show("FINISHED")

    def describe(self, text: str) -> None:
        """Set the description, Markdown."""
        self.client.set_tag(self.run_id, NOTE_TAG, tag(text))

    def log_headline(self, metrics: Mapping[str, float]) -> None:
        """Show the figures that pipeline runs are compared by."""
        for name, value in metrics.items():
            self.client.log_metric(self.run_id, metric_name(name), float(value))


def overall_status(children: Sequence[Any]) -> str:
    """How a pipeline stands whose last step has not ended well yet, from its steps' runs."""
    statuses = {run.info.status for run in _standing(children)}
    return next((status for status in ("FAILED", "KILLED") if status in statuses), "RUNNING")


def end_open(client: MlflowClient, children: Sequence[Any], status: str) -> list[Any]:
    """End the runs of steps that are over, and did not say so themselves: killed, server away.

    Args:
        client: of the tracking server.
        children: runs of a pipeline's steps.
        status: of those; one that was tried again was killed.

    Returns:
        The runs that were open.
    """
    standing = {run.info.run_id for run in _standing(children)}
    left = [run for run in children if run.info.status == "RUNNING"]
    for run in left:
        own = status if run.info.run_id in standing else "KILLED"
        client.set_terminated(run.info.run_id, own)
    return left


def _standing(children: Sequence[Any]) -> list[Any]:
    """The runs that count.

    A step's later run stands for the earlier ones of the same work; a failure of unknown work
    (before its recipe was read) is made good by any later run of the step.
    """
    standing: list[Any] = []
    for run in sorted(children, key=_started, reverse=True):
        work = run.data.tags.get(WORK_TAG)
        later = [one for one in standing if one.info.run_name == run.info.run_name]
        if not any(work is None or one.data.tags.get(WORK_TAG) == work for one in later):
            standing.append(run)
    return standing


def _started(run: Any) -> int:  # noqa: ANN401 - mlflow's Run
    return int(run.data.tags.get(STARTED_TAG) or run.info.start_time)
