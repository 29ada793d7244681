"""torchrun, but for the traceback with which it tells that a rank failed: the rank has said why.

`python -m flagscale.steps.torchrun` takes torchrun's arguments.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ChildFailedError:
        sys.exit(1)
