"""Where the layouts stand that are tried here on a GPU. Not yet run on one."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "flagscale"
# layout_cases and layout_worker; resume_worker
sys.path[:0] = [str(TESTS / "train"), str(TESTS / "train" / "checkpoints")]
