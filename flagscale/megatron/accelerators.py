"""Whether this process can use the accelerators that its pod was given, and why it cannot.

A pod knows how many it was given by the pipeline (`FLAGSCALE_ACCELERATOR_COUNT`). Where nobody says
so, as on a laptop, a machine without a usable GPU works on its CPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
from pathlib import Path

import torch

from flagscale import variables
from flagscale.errors import UserError

logger = logging.getLogger(__name__)

# CUDA's major version: the oldest of NVIDIA's drivers that its minor versions run on.
MINIMUM_DRIVERS = {12: 525, 13: 580}


def check_accelerators() -> None:
    """Make sure that torch can use as many accelerators as the pod was given.

    Raises:
        UserError: it cannot; with torch's own reason, and the versions of CUDA and of the driver.
    """
    wanted = _given()
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted and found < wanted:
        raise UserError(_refusal(wanted, found))
    if not wanted and not found:
        _tell_of_unused()


def has_transformer_engine() -> bool:
    """Whether transformer-engine is installed, and its libraries load.

    Raises:
        UserError: it is installed and does not import, e.g. because it was built for another torch;
            with what the loader says.
    """
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a loader's error, or whatever its own check of versions raises
        raise UserError(
            f"transformer-engine {version} is installed but does not import with torch "
            f"{torch.__version__}: {type(error).__name__}: {error}; use the image's own of both, "
            "or training.transformer_impl=local, which does without"
        ) from error
    return True


def _given() -> int:
    text = os.environ.get(variables.ACCELERATORS) or "0"
    if not text.isdecimal():
        raise UserError(f"{variables.ACCELERATORS}={text!r}: must be a whole number, e.g. 8")
    return int(text)


def _refusal(wanted: int, found: int) -> str:
    why = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '(unset)')}"
    if not found:
        why = _reason()
    return (
        f"{variables.ACCELERATORS}={wanted}: this pod was given so many accelerators, but torch "
        f"can use {found} ({why}; {_versions()}). The CPU does not take their place: see "
        "docs/cluster.md, When it fails"
    )


def _reason() -> str:
    """What torch says when it is to start CUDA."""
    try:
        torch.cuda.init()
    except Exception as error:  # of many kinds, an AssertionError among them
        return " ".join(str(error).split()).rstrip(".")
    return "no device is visible"


def _versions() -> str:
    cuda = torch.version.cuda
    if cuda is None:
        return f"torch {torch.__version__} is built without CUDA: is this the CPU image?"
    driver = _driver() or "no driver that answers"
    minimum = MINIMUM_DRIVERS.get(int(cuda.split(".")[0]))
    needs = f", which needs driver {minimum} or later" if minimum else ""
    return f"torch is built for CUDA {cuda}{needs}; here is {driver}"


def _driver() -> str | None:
    """The driver's version, from its management library."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return f"driver {pynvml.nvmlSystemGetDriverVersion()}"
    except Exception as error:  # no such package or library, or it finds no driver
        logger.debug("no driver's version: %s", error)
        return None


@functools.cache
def _tell_of_unused() -> None:
    """A machine has a GPU that torch cannot use: legitimate, but seldom meant."""
    devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if devices:
        logger.warning(
            "/dev has %s, but torch cannot use it (%s): working on the CPU",
            ", ".join(devices),
            _reason(),
        )
