"""The tree that stands for a KFP pod does what was seen of real ones."""

import os
from pathlib import Path

import psutil
import pytest
from kfp_pod import KfpPod, unshare

pytestmark = pytest.mark.skipif(not unshare(), reason="this user may not make PID namespaces")

# Asked to stop, it would save; its grace is far longer than any test.
STEP = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])

def save(*_):
    (folder / "asked").touch()
    time.sleep(600)
    (folder / "saved").touch()

signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
time.sleep(600)
"""


@pytest.fixture
def pod(tmp_path: Path) -> KfpPod:
    pod = KfpPod(["-c", STEP, str(tmp_path)], os.environ, tmp_path)
    while not (tmp_path / "ready").exists():
        assert pod.is_running()
    return pod


def test_the_tree(pod: KfpPod) -> None:
    emissary, launcher, shell, step = pod.processes()
    assert os.getpgid(launcher.pid) == os.getpgid(step.pid) != os.getpgid(emissary.pid)
    assert [one.ppid() for one in (launcher, shell, step)] == [
        one.pid for one in (emissary, launcher, shell)
    ]
    assert shell.name() == "sh"
    pod.vanish()
    assert pod.end()[0] == -9


@pytest.mark.parametrize("how", ["stop", "vanish"])
def test_nothing_outlives_it(pod: KfpPod, tmp_path: Path, how: str) -> None:
    processes = pod.processes()
    getattr(pod, how)()
    assert pod.end()[0] == (143 if how == "stop" else -9)
    assert psutil.wait_procs(processes, timeout=300)[1] == []
    assert not (tmp_path / "saved").exists()
    assert how == "stop" or not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("code", "told"), [(0, 0), (1, 1), (7, 1)])
def test_its_exit_code_is_the_launchers(tmp_path: Path, code: int, told: int) -> None:
    pod = KfpPod(["-c", f"print('hello'); raise SystemExit({code})"], os.environ, tmp_path)
    assert pod.end() == (told, "hello\n")
