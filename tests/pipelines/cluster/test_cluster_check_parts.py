"""The parts of `make test-cluster` that need no cluster: settings, names, the blow at a process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flagscale.errors import UserError
from tests.cluster import pods
from tests.cluster.local import LocalRun
from tests.cluster.settings import ROOT, Settings, read_settings
from tests.cluster.table import Failed


@pytest.mark.parametrize(
    ("node", "is_training"),
    [
        ("distillation-mxbhw(0).root(0).distil-student(0).executor(1)", True),
        ("distillation-mxbhw.root.distil-student.executor(0)", True),  # no policy reaches the DAGs
        ("distillation-mxbhw(0).root(0).distil-student-on-nodes(0).executor(0)", True),
        ("distillation-mxbhw(0).root(0).distil-student-driver(0)", False),
        ("distillation-mxbhw(0).root(0).evaluate(0).executor(0)", False),
    ],
)
def test_the_trainings_pods_are_known_by_argos_names(node: str, is_training: bool) -> None:
    assert bool(pods._TRAINING.search(node)) is is_training


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a PID namespace, which root may")
def test_the_main_process_of_a_step_is_what_is_killed(tmp_path: Path) -> None:
    """In a tree like a step's pod: a first process, KFP's launcher, a shell, the step."""
    launch = tmp_path / "launch"
    shutil.copy(shutil.which("bash") or "", launch)
    step = f"{sys.executable} -c 'import time; time.sleep(600)'"
    (tmp_path / "first").write_text(
        f'{launch} -c "sh -c \\"{step}\\"; true" & child=$!\n'
        f"until grep -qs {launch} /proc/$child/cmdline; do sleep 0.05; done\n"
        f'{sys.executable} -c "$KILL"\n'
        "wait $child; echo ended with $?\n"
    )
    done = subprocess.run(
        ["unshare", "--fork", "--pid", "--mount-proc", "sh", tmp_path / "first"],
        env={**os.environ, "KILL": pods._KILL},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == ["killed", "ended with 137"], done.stderr


def test_a_run_here_that_fails_is_said(tmp_path: Path) -> None:
    given = Settings("cpu-only", "package:none", "tiny-0a1b2c3d", "kubeflow", None, False, None)
    local = LocalRun(given, tmp_path / "runs")
    try:
        with pytest.raises(Failed, match=r"the run on this machine: error: .*package:none"):
            local.finish(300)
    finally:
        local.stop()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "KFP_ENDPOINT, .*PLATFORM, .*TEACHER, "),
        ({"KFP_ENDPOINT": "http://x", "PLATFORM": "cpu-only"}, "^make test-cluster needs TEACHER"),
        (
            {"KFP_ENDPOINT": "http://x", "PLATFORM": "cpu", "TEACHER": "/t"},
            "platform cpu: no such file",
        ),
        (
            {"KFP_ENDPOINT": "x", "PLATFORM": "cpu-only", "TEACHER": "t", "MINUTES": "-1"},
            "MINUTES=-1",
        ),
    ],
)
def test_what_is_missing_is_said_at_once(given: dict[str, str], missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        read_settings(given)


def test_the_command_says_what_is_missing() -> None:
    unset = ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT", "PLATFORM", "TEACHER")
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: make test-cluster needs KFP_ENDPOINT")


def test_two_goes_never_meet() -> None:
    given = {"KFP_ENDPOINT": "http://x", "PLATFORM": "gke-h100", "TEACHER": "/t"}
    first, second = read_settings(given), read_settings(given)
    assert first.name != second.name
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", first.name)
    assert first.shared == "/mnt/flagscale"


def test_nothing_of_it_is_collected() -> None:
    assert not list((ROOT / "tests" / "cluster").glob("test_*.py"))
