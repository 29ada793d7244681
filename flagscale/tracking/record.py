"""The last word on a KFP run whose steps have all ended well: the cached ones, and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from flagscale.tracking.attempts import short_digest
from flagscale.tracking.copies import copy_run
from flagscale.tracking.names import CACHED_KFP_TAG, OF_KFP_RUN_TAG, WORK_TAG, own_kfp_run
from flagscale.tracking.place import find_place
from flagscale.tracking.step import on_server

if TYPE_CHECKING:
    from mlflow import MlflowClient

_RECORDER = "record-run"


class Reported(NamedTuple):
    """What a step has told of its work.

    Attributes:
        step: its name.
        figures: name -> value.
        run_id: MLflow's id of the run that did the work, if it was tracked.
        kfp_run_id: KFP's id of the run that the work was done in, if known.
    """

    step: str
    figures: Mapping[str, float]
    run_id: str | None
    kfp_run_id: str | None


def record_run(reports: Sequence[Reported], headline: Mapping[str, float]) -> None:
    """Show the steps that KFP's cache served, and end the KFP run's parent.

    Where KFP's plugin has made the parent, it ends it too. Outside a KFP run nothing is done.

    Args:
        reports: of all steps.
        headline: the figures that pipeline runs are compared by.
    """
    if own_kfp_run() is not None:
        on_server(lambda client: _record(client, reports, headline), "the run is not recorded")


def _record(
    client: MlflowClient, reports: Sequence[Reported], headline: Mapping[str, float]
) -> None:
    own = own_kfp_run() or ""
    place = find_place(client, _RECORDER, own=False)
    query = f"tags.`{OF_KFP_RUN_TAG}` = '{own}' and attributes.status = 'FINISHED'"
    found = client.search_runs([place.experiment_id], query)
    there = {run.data.tags.get(WORK_TAG) for run in found}
    for report in reports:
        work = short_digest([*report])
        # Variants that share a step share its report; an earlier attempt has recorded it already.
        if report.kfp_run_id != own and work not in there:
            there.add(work)
            _copy(client, report, {OF_KFP_RUN_TAG: own, WORK_TAG: work})
    if place.kfp_run is not None:
        place.kfp_run.log_headline(headline)
        place.kfp_run.finish()


def _copy(client: MlflowClient, report: Reported, tags: dict[str, str]) -> None:
    place = find_place(client, report.step, own=False)
    if place.parent is None:
        return
    tags[CACHED_KFP_TAG] = report.kfp_run_id or "unknown"
    copy_run(
        client,
        place.experiment_id,
        place.parent,
        report.step,
        report.run_id,
        report.figures,
        tags,
    )
