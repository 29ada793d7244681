"""The first node's log, line by line into the step's own."""

from __future__ import annotations

import logging
import sys
import threading

from flagscale.errors import UserError
from flagscale.execution.trainjob.cluster import Cluster
from flagscale.execution.trainjob.state import first_node

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0


class NodeLog:
    """Follows the log from a thread. A broken stream is taken up again where it broke."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        """Follow TrainJob `name`."""
        self._cluster, self._name = cluster, name
        self._ended = threading.Event()
        self._pod: str | None = None
        self._told = 0
        self._reader = 0  # who may write: a reader that hangs must not come back
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self, patience_seconds: float) -> None:
        """Take what is left of the log, and end; nothing is read or written after it.

        Args:
            patience_seconds: a node that is lost does not answer, and the SDK waits for ever. The
                stream that is followed has half of them to end by itself.
        """
        self._ended.set()
        self._thread.join(patience_seconds / 2)
        self._reader += 1
        last = threading.Thread(target=self._read, args=(False, self._reader), daemon=True)
        last.start()
        last.join(patience_seconds / 2)
        if last.is_alive():
            logger.warning("the first node's log does not answer; its end may be missing here")
        self._reader += 1

    def _run(self) -> None:
        while not self._ended.is_set():
            self._read(follow=True, reader=0)
            self._ended.wait(_RETRY_SECONDS)

    def _read(self, follow: bool, reader: int) -> None:
        """The log always comes from its beginning: skip what was told."""
        try:
            pod = first_node(self._cluster.pods(self._name))
            if pod is None:
                return
            if pod != self._pod:
                self._pod, self._told = pod, 0
            for number, line in enumerate(self._cluster.log(self._name, follow)):
                if reader != self._reader:
                    return
                if number >= self._told:
                    sys.stdout.write(f"{line}\n")
                    sys.stdout.flush()
                    self._told = number + 1
        except UserError as error:  # the log is not what the step is for
            logger.debug("%s", error)
