"""How many cores a process may keep busy, by its control groups."""

import os
from pathlib import Path

import pytest

from flagscale.cores import available_cores

ALL = float(len(os.sched_getaffinity(0)))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")
    return path


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, ALL),
        ("0::/\n", {}, ALL),
        ("0::/pod/main\n", {"pod/cpu.max": "75000 100000\n", "pod/main/cpu.max": "max 1\n"}, 0.75),
        ("0::/of/the/node\n", {"cpu.max": "150000 200000\n"}, 0.75),
        (
            "4:memory:/a\n2:cpu,cpuacct:/a\n0::/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "25000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            0.25,
        ),
        (
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            ALL,
        ),
        ("1:cpuset:/a\n", {"cpuset/a/cpu.cfs_quota_us": "1\n"}, ALL),
        ("0::/\n", {"cpu.max": "900000000 100000\n"}, ALL),  # more than there are
    ],
)
def test_control_groups_limit_cores(
    membership: str, files: dict[str, str], cores: float, tmp_path: Path
) -> None:
    for name, text in files.items():
        write(tmp_path / "groups" / name, text)
    mine = write(tmp_path / "membership", membership)
    assert available_cores(tmp_path / "groups", mine) == cores


def test_a_machine_without_control_groups_gives_what_the_scheduler_gives(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "none", tmp_path / "none") == ALL
