"""The end of a KFP run, told by who has seen it there: what its steps left open in MLflow ends."""

from __future__ import annotations

from flagscale.tracking.kfp_run import end_open
from flagscale.tracking.names import KFP_RUN_TAG, OF_KFP_RUN_TAG, as_id
from flagscale.tracking.server import (
    find_everywhere,
    make_client,
    quick_to_give_up,
    tracking_uri,
    unusable,
)

_ENDS = {  # KFP's state: of the steps' open runs, of the run itself
    "SUCCEEDED": ("FINISHED", "FINISHED"),
    "FAILED": ("KILLED", "FAILED"),  # nobody was left to say what became of the step
    "CANCELED": ("KILLED", "KILLED"),
}


def close_ended(kfp_run_id: str, state: str) -> int:
    """End what still reads RUNNING of a KFP run that has ended.

    Args:
        kfp_run_id: KFP's id of the run.
        state: KFP's, e.g. FAILED.

    Returns:
        How many runs were ended; 0 where `MLFLOW_TRACKING_URI` names no server.

    Raises:
        UserError: the server does not answer, or refuses, within seconds.
    """
    uri, kfp_run_id = tracking_uri(), as_id(kfp_run_id)
    if not uri or state not in _ENDS:
        return 0
    of_steps, of_run = _ENDS[state]
    try:
        with quick_to_give_up():
            client = make_client(uri)
            children = find_everywhere(client, f"tags.`{OF_KFP_RUN_TAG}` = '{kfp_run_id}'")
            left = end_open(client, children, of_steps)
            parents = find_everywhere(client, f"tags.`{KFP_RUN_TAG}` = '{kfp_run_id}'")
            wrong = [run for run in parents if _reads_wrong(run.info.status, of_run)]
            for run in wrong:
                client.set_terminated(run.info.run_id, of_run)
    except Exception as error:  # MLflow and its databases raise many kinds
        raise unusable(uri, error) from error
    return len(left) + len(wrong)


def _reads_wrong(status: str, of_run: str) -> bool:
    """A failure that was made good counts no more; how a run failed, its steps know better."""
    return status == "RUNNING" or (of_run == "FINISHED" and status != "FINISHED")
