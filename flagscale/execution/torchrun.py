"""torchrun, but for three things.

* What it tells at length when a rank fails: the rank has said why.
* SIGTERM, e.g. to a pod whose node is drained: torchrun would give its ranks 30 seconds, and a
  checkpoint may take longer. Here it is only passed on; they end when they have saved, or when who
  sent it loses patience. While torchrun still waits for other nodes there is nothing to save.

* Each rank's output goes into a file in the folder of the ranks, too, from which torchrun shows it:
  `flagscale.execution.rank_logs` keeps those of ranks that fail.

`python -m flagscale.execution.torchrun` takes torchrun's arguments.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import psutil

from flagscale.execution.notes import LOGS, REQUEST_VARIABLE

_EXIT_STOPPED = 128 + signal.SIGTERM
# Not SIGTERM, or torch would put its own handler in place when it starts the ranks.
_TORCHS_SIGNALS = ("--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT")
_PREFIX_VARIABLE = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"  # there is no option for it


def _pass_on_sigterm() -> None:
    """Tell the ranks, from a thread: the main one may wait inside torch, where no handler runs."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)

    def work() -> None:
        while True:
            if signal.SIGTERM in os.read(read, 1):
                ranks = psutil.Process().children()
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
                if not ranks:
                    os._exit(_EXIT_STOPPED)

    threading.Thread(target=work, daemon=True).start()


def _logs() -> list[str]:
    """Options for the ranks' output; none where they have no folder."""
    folder = os.environ.get(REQUEST_VARIABLE)
    if folder is None:
        return []
    os.environ.setdefault(_PREFIX_VARIABLE, "[rank ${rank}] ")
    node = os.environ.get("PET_NODE_RANK", "0")  # Trainer's
    return ["--tee", "3", "--log-dir", os.path.join(folder, LOGS, node)]


if __name__ == "__main__":
    _pass_on_sigterm()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):  # what the ranks say passes through here: at once
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        main([*_TORCHS_SIGNALS, *_logs(), *sys.argv[1:]])
    except ChildFailedError:
        sys.exit(1)
