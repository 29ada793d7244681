"""The pod of a KFP step on this machine: the tree of processes that Argo and KFP make.

    argoexec emissary     PID 1 of a PID namespace; passes SIGTERM on to its child's process group
    KFP's launcher        has no handler for it, and dies
    sh -ec
    python                the step

The emissary ends as soon as its child has, and the kernel kills what is left in the namespace: a
step that is stopped is gone a moment after the signal, whatever the grace period and whatever it
still meant to do.
"""

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_PATIENCE_SECONDS = 300
_TREE = Path(__file__).with_name("kfp_pod_tree.py")
_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_AS_ROOT = ("--user", "--map-root-user")
_SHELL = ("sh", "-ec", 'true\n"$0" "$@"\n')


@functools.cache
def unshare() -> tuple[str, ...]:
    """The command that makes a PID namespace; empty where this user may not."""
    for command in (_NAMESPACE, (*_NAMESPACE, *_AS_ROOT)):
        try:
            subprocess.run([*command, "true"], check=True, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            continue
        return command
    return ()


class KfpPod:
    """A running pod."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        """Start it.

        Args:
            command: Python's arguments for the step.
            environment: the whole of it.
            folder: to run in.
        """
        tree = (sys.executable, "-S", _TREE, "emissary", *_SHELL, sys.executable)
        self._process = subprocess.Popen(
            [*unshare(), *tree, *map(str, command)],
            env=dict(environment),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def is_running(self) -> bool:
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """What runs in it, PID 1 first."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not (found := psutil.Process(self._process.pid).children(recursive=True)):
            assert self.is_running()
            assert time.monotonic() < deadline
        return found

    def stop(self) -> None:
        """What Kubernetes does to stop it: SIGTERM to PID 1."""
        self.processes()[0].send_signal(signal.SIGTERM)

    def vanish(self) -> None:
        """What a node does that loses power."""
        self._process.kill()  # with which PID 1 goes

    def end(self) -> tuple[int, str]:
        """Wait for it; its exit code (-9 if it has vanished) and its log."""
        output = self._process.communicate(timeout=_PATIENCE_SECONDS)[0]
        return self._process.returncode, output
