"""torchrun, but for two things.

* What it tells at length when a rank fails: the rank has said why.
* SIGTERM, e.g. to a pod whose node is drained: torchrun would give its ranks 30 seconds, and a
  checkpoint may take longer. Here it is only passed on; they end when they have saved, or when who
  sent it loses patience. While torchrun still waits for other nodes there is nothing to save.

`python -m flagscale.execution.torchrun` takes torchrun's arguments.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import psutil

_EXIT_STOPPED = 128 + signal.SIGTERM
# Not SIGTERM, or torch would put its own handler in place when it starts the ranks.
_TORCHS_SIGNALS = ("--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT")


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


if __name__ == "__main__":
    _pass_on_sigterm()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main([*_TORCHS_SIGNALS, *sys.argv[1:]])
    except ChildFailedError:
        sys.exit(1)
