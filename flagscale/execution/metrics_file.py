"""The file of a step's figures, which also says in which run the work was done.

KFP's own copy of the figures, which its UI shows, holds numbers only. The file goes through the
cache with them: a later run that is served from it learns whose figures they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from flagscale import tracking
from flagscale.artifacts import write_json

_MADE_IN = "made in"


def write_metrics(path: Path, figures: Mapping[str, float]) -> dict[str, float]:
    """Write the figures of the running step.

    Args:
        path: of the file.
        figures: name -> value; those that JSON cannot hold (NaN, infinity) are left out.

    Returns:
        The figures that were written.
    """
    values = {name: float(value) for name, value in figures.items()}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    made_in = {
        "mlflow_run_id": tracking.run_id_of_process(),
        "kfp_run_id": tracking.own_kfp_run(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**values, _MADE_IN: made_in})
    return values


def read_metrics(path: Path, step: str) -> tracking.Reported:
    """What a step has told of its work; no figures if the file is gone or was cut off.

    Args:
        path: of the file.
        step: its name.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = {}
    made_in = values.pop(_MADE_IN, {})
    return tracking.Reported(step, values, made_in.get("mlflow_run_id"), made_in.get("kfp_run_id"))
