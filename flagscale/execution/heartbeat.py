"""A launcher's heartbeat, for ranks on other machines: they end when it stops or falls silent.

The launcher renews a small file on the shared volume; each rank looks at it. Process numbers mean
nothing in another pod, and nobody can delete a TrainJob for a launcher that was killed.

The file is rewritten in place and looked at by opening it: network file systems show that at once,
while new names in a folder may appear a minute late. Only changes count, not clocks, and only time
in which there was an answer: a volume that stalls for minutes ends no training.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "FLAGSCALE_HEARTBEAT_SECONDS"
_FILE = "heartbeat"
_STOP = "stop"


def limit_seconds() -> float:
    """How long a launcher may be silent before its ranks save and end."""
    return float(os.environ.get(LIMIT_VARIABLE, "60"))


class Heartbeat:
    """The launcher's side; renews the file from a thread until the block ends, which says stop."""

    def __init__(self, folder: Path, stop_when: Callable[[], bool]) -> None:
        """Begin to beat in `folder`.

        Args:
            folder: of the ranks.
            stop_when: asked often; ranks hear of it at once, whatever else the launcher waits for.
        """
        self._path = folder / _FILE
        self._stop_when = stop_when
        self._stopped = threading.Event()
        self._count = 0
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask the ranks to save and end."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        ask_to_stop(self._path.parent)

    def _run(self) -> None:
        while not self._stopped.wait(_pause(limit_seconds())):
            if self._stop_when():
                ask_to_stop(self._path.parent)
                return
            self._beat()

    def _beat(self) -> None:
        self._count += 1
        _write(self._path, str(self._count))


def ask_to_stop(folder: Path) -> None:
    """Ask the ranks of a folder, perhaps another launcher's, to save and end."""
    _write(folder / _FILE, _STOP)


def heed(folder: Path) -> None:
    """The rank's side: from now on this process gets SIGTERM when it is time to end.

    Does nothing where no launcher beats: the ranks of this machine are its process's children.
    """
    path = folder / _FILE
    if path.exists():
        threading.Thread(target=_watch, args=(path, limit_seconds()), daemon=True).start()


def _watch(path: Path, limit: float) -> None:
    seen, silent, looked = "", 0.0, time.monotonic()
    while True:
        # A file that is gone is as silent as one that stands still.
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="utf-8")
            if text == _STOP:
                break
            if text != seen:
                seen, silent = text, 0.0
        # A look that hangs, because the volume does, is one look: the launcher hangs there too.
        now = time.monotonic()
        silent, looked = silent + min(now - looked, 2 * _pause(limit)), now
        if silent > limit:
            logger.warning("nothing heard of the launcher for %.0f seconds: stopping", silent)
            break
        time.sleep(_pause(limit))
    os.kill(os.getpid(), signal.SIGTERM)


def _pause(limit: float) -> float:
    """Between two beats, or two looks: 3 seconds where the limit is a minute."""
    return limit / 20


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:  # the ranks will notice before anybody could be told here
        logger.warning("%s: %s", path, error)
