"""torchrun, but for what it tells at length when a rank fails: the rank has said why.

`python -m flagscale.steps.torchrun` takes torchrun's arguments.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(sys.argv[1:])
    except ChildFailedError:
        sys.exit(1)
