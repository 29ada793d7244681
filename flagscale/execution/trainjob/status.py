"""How far a training is, told to Kubeflow Trainer: `kubectl get trainjob NAME --output yaml`.

Trainer gives its pods an address, a token and a certificate where the cluster has switched on its
feature gate `TrainJobStatus` (alpha in 2.3); elsewhere nothing is told. The training only leaves
its last figures here: a thread of their own sends them, so that a server that is slow, refuses or
hangs costs the training nothing. The SDK itself would let each step wait for it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

logger = logging.getLogger(__name__)

URL_VARIABLE = "KUBEFLOW_TRAINER_SERVER_URL"
_SECONDS_BETWEEN = 6.0  # the SDK sends nothing for 5 seconds after what it has sent
_SECONDS_AFTER_FAILURE = 60.0
_END_SECONDS = 10.0  # for the last word, when the training is over
_SDK = "kubeflow.trainer.backends.kubernetes.utils"  # its logger


class _Told(NamedTuple):
    progress_percent: int
    estimated_remaining_seconds: int | None
    metrics: dict[str, float]


class TrainJobStatus:
    """Tells Trainer from a thread, while its block lasts; nobody where Trainer does not ask."""

    def __init__(self) -> None:
        self._latest: _Told | None = None
        self._metrics: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> TrainJobStatus:
        if os.environ.get(URL_VARIABLE):
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join(_END_SECONDS)

    def tell(
        self, step: int, last_step: int, left_seconds: float | None, figures: Mapping[str, float]
    ) -> None:
        """Note what is to be told next. Returns at once.

        Args:
            step: optimiser steps done.
            last_step: of the training.
            left_seconds: that the rest will take; None where nobody can say now.
            figures: name -> value, e.g. losses in nats a token. What was told before stays.
        """
        self._metrics = {**self._metrics, **figures, "step": float(step)}
        before = self._latest.estimated_remaining_seconds if self._latest else None
        left = before if left_seconds is None else round(left_seconds)
        self._latest = _Told(100 * step // last_step, left, self._metrics)

    def _run(self) -> None:
        from kubeflow.trainer import update_trainjob_status

        # It warns of every attempt; here it is said once.
        logging.getLogger(_SDK).setLevel(logging.ERROR)
        sent: _Told | None = None
        pause, warned = 0.0, False
        while True:
            began = time.monotonic()
            is_last = self._ended.wait(pause)
            if is_last and sent is not None and sent != self._latest:
                time.sleep(max(0.0, pause - (time.monotonic() - began)))
            told = self._latest
            if told is not None and told != sent:
                took = update_trainjob_status(**told._asdict())
                sent = told if took else None
                if not took and not warned:
                    logger.warning("Trainer did not take how far the training is; going on")
                    warned = True
                pause = _SECONDS_BETWEEN if took else _SECONDS_AFTER_FAILURE
            else:
                pause = _SECONDS_BETWEEN
            if is_last:
                return
