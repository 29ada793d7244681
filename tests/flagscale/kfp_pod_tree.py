"""The processes of a KFP pod above the step's own: `kfp_pod_tree.py emissary|launch COMMAND...`."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence


def _emissary(command: Sequence[str]) -> int:
    """Argo's: passes a signal on, and ends with its child."""
    launcher = subprocess.Popen(
        [sys.executable, "-S", __file__, "launch", *command], process_group=0
    )
    signal.signal(signal.SIGTERM, lambda number, _: os.killpg(launcher.pid, number))
    code = launcher.wait()
    return 128 - code if code < 0 else code


def _launch(command: Sequence[str]) -> int:
    """Whatever the step's exit code was, KFP's launcher has 1."""
    return 1 if subprocess.call(command) else 0


if __name__ == "__main__":
    role = {"emissary": _emissary, "launch": _launch}[sys.argv[1]]
    sys.exit(role(sys.argv[2:]))
