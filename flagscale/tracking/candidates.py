"""A search's candidates in MLflow: a child of the search's run each, with its curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale.tracking.step import step_run

CANDIDATE_TAG = "flagscale.candidate"
STATUS_TAG = "flagscale.candidate_status"
_MADE = ("parameters", "memory_bytes", "forward_flops_per_token")
_FORECAST = ("value", "low", "high")
_COSTS = ("tokens", "rank_seconds", "tokens_per_second")


def log_candidates(board: Mapping[str, Any]) -> None:
    """Add a child for each candidate, or go on in it: its fields, held-out losses, size and cost.

    Select them with `tags."flagscale.candidate" != ""`; the steps' runs stay beside them.

    Args:
        board: the content of search.json.
    """
    for place, one in enumerate(board["candidates"], start=1):
        student = (one["student"] or {}).get("digest", "")
        with step_run(one["name"], one["changes"], f"candidate {one['name']} {student}") as run:
            run.set_tag(CANDIDATE_TAG, one["name"])
            run.set_tag(STATUS_TAG, f"{one['status']}: {one['why']}".rstrip(": "))
            for point in one["points"]:
                run.log_metrics({"held-out loss": point["loss"]["value"]}, step=point["step"])
                for forecast in point["forecasts"][-1:]:  # of the end of its training
                    told = {f"forecast/{name}": forecast[name] for name in _FORECAST}
                    run.log_metrics(told, step=point["step"])
            figures = {name: float(one["made"][name]) for name in _MADE if name in one["made"]}
            run.log_metrics(figures | {name: one[name] for name in _COSTS} | {"rank": float(place)})
