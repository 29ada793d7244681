"""Where the layouts stand that are tried here on a GPU. Not yet run on one."""

import sys
from pathlib import Path

import pytest
from gpu_machine import ON_CPU

from flagscale.megatron import platform

FOLDER = Path(__file__).parent

TESTS = Path(__file__).parents[1] / "flagscale"
# layout_cases and layout_worker; resume_worker
sys.path[:0] = [str(TESTS / "train"), str(TESTS / "train" / "checkpoints")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test of this folder runs without a GPU, unless it is asked to."""
    if platform.HAS_GPU or ON_CPU:
        return
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
