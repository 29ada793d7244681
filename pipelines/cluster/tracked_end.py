"""MLflow's side of a run that has ended on the cluster: a killed step could not end its own run."""

from __future__ import annotations

import os

from flagscale.errors import UserError
from pipelines.cluster.server import say

_BADLY = ("FAILED", "CANCELED")


def end_in_mlflow(run_id: str, state: str) -> None:
    """End what still reads RUNNING in MLflow of a run that has ended, and say so.

    It needs `MLFLOW_TRACKING_URI`: steps call the server by a name that holds in the cluster only.

    Args:
        run_id: KFP's id of the run.
        state: KFP's; nothing is done while it goes on.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        if state in _BADLY:
            say(
                "MLflow may still show killed steps as RUNNING: MLFLOW_TRACKING_URI=... "
                f"python -m pipelines status {run_id} ends them"
            )
        return
    from flagscale import tracking

    try:
        ended = tracking.close_ended(run_id, state)
    except UserError as error:
        say(f"MLflow was not told that the run has ended: {error}")
        return
    if ended:
        say(f"MLflow: {ended} runs of it still read RUNNING, and were ended")
