"""What a run is told: points of curves, and letters, which are everything else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flagscale.tracking.kfp_run import KfpRun


class Begun(NamedTuple):
    """A run that there is.

    Attributes:
        run_id: MLflow's id.
        experiment_id: MLflow's id of its experiment.
        known: name of a metric -> steps that the run has already, which are not sent again.
        resumes: the run that did the first part of this work; None where there is none.
        parent: the run above it, if the steps look after that one themselves.
        samples: of the machines, that the run has already.
    """

    run_id: str
    experiment_id: str
    known: Mapping[str, set[int]] = {}
    resumes: str | None = None
    parent: KfpRun | None = None
    samples: int = 0


class Point(NamedTuple):
    """A figure.

    Attributes:
        name: as MLflow takes it.
        value: of any unit.
        time: when it was found, ms since 1970.
        step: of the optimiser; None for a figure of the whole run.
    """

    name: str
    value: float
    time: int
    step: int | None


Send = Callable[["MlflowClient", Begun], object]


@dataclass
class Letter:
    """Something else than a point.

    Attributes:
        kind: what it is, for the log.
        send: tells the server; may be called several times.
        done: it has arrived, or never will.
    """

    kind: str
    send: Send
    done: threading.Event = field(default_factory=threading.Event)
