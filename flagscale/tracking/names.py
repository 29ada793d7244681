"""Names and texts as MLflow takes them."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

from flagscale import variables
from flagscale.processes import this_process
from flagscale.secrets import mask

PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"  # the description
KIND_TAG = "mlflow.experimentKind"
MISSING_TAG = "flagscale.missing"  # what could not be stored with the run, and why
ATTEMPT_TAG = "flagscale.attempt"  # of one call that makes a run, for its further attempts
PROCESS_TAG = "flagscale.process"  # `<host>:<process>` that works on the run
CACHED_TAG = "flagscale.cached_from"  # the run that did the work
CACHED_KFP_TAG = "flagscale.cached_from_kfp_run"  # the KFP run that it was done in
RESUMED_TAG = "flagscale.resumed_from"  # the run that did the first part of the work
KFP_RUN_TAG = "flagscale.kfp_run_id"  # of a parent: the KFP run whose steps are its children
OF_KFP_RUN_TAG = "flagscale.of_kfp_run"  # of a child: the KFP run that it was made in
WORK_TAG = "flagscale.work"  # of a child: equal for attempts at the same work
STARTED_TAG = "flagscale.started"  # of a child: the last attempt's start, ms
TRAINING_TAG = "flagscale.training"  # of a child: equal for trainings that resume each other

_LONGEST_PARAM = 500  # characters: what every MLflow server takes
_LONGEST_TAG = 5000


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`; lists become JSON, None stays out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = json.dumps(value)
        elif value is not None:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def metric_name(name: str) -> str:
    """With characters that MLflow refuses replaced."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def parameter(value: str) -> str:
    """No longer than every server takes, and without secrets."""
    value = mask(value)
    return value if len(value) <= _LONGEST_PARAM else value[: _LONGEST_PARAM - 1] + "…"


def tag(value: object) -> str:
    """No longer than every server takes, and without secrets."""
    return mask(str(value))[:_LONGEST_TAG]


def first_line(error: BaseException) -> str:
    """What went wrong, in one line and without secrets: MLflow's errors name whole URLs."""
    return mask((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]


def own_kfp_run() -> str | None:
    """Id of the KFP run that this process works for, None outside of one."""
    return as_id(os.environ.get(variables.KFP_RUN, "")) or None


def as_id(text: str) -> str:
    """Without what would end a quoted text in a query; KFP's ids are letters, digits, dashes."""
    return re.sub(r"[^\w.-]", "", text)


def here() -> str:
    """This process, among those of all machines."""
    return f"{socket.gethostname()}:{this_process()}"
