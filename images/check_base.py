"""Refuses a base whose torch was replaced, or whose transformer-engine Megatron-Core does not take.

Run by the environment's own interpreter, while the GPU image is built: versions first, then whether
what was built for one another still loads together.
"""

import importlib.metadata
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# NVIDIA's driver is the node's: a build has none.
DRIVER = "libcuda.so.1"


def problems(environment: Path) -> list[str]:
    """What is wrong, empty if nothing.

    Args:
        environment: where the image's own packages lie; the base's lie elsewhere.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for text in ["torch", *project["optional-dependencies"]["gpu"]]:
        wanted = Requirement(text)
        try:
            package = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"the base has no {wanted.name}")
            continue
        if environment in Path(str(package.locate_file(""))).resolve().parents:
            found.append(f"{wanted.name} {package.version} was installed over the base's")
        if not wanted.specifier.contains(package.version, prereleases=True):
            found.append(f"the base has {wanted.name} {package.version}: want {wanted.specifier}")
    return found


def _torch_takes_numpy() -> None:
    import numpy
    import torch

    torch.from_numpy(numpy.zeros(1))  # fails where torch was built for another numpy


def _transformer_engine_loads() -> None:
    import transformer_engine.pytorch  # noqa: F401


def _megatron_takes_transformer_engine() -> None:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise ImportError("Megatron-Core goes on as if there were no transformer-engine")


CHECKS: tuple[Callable[[], None], ...] = (
    _torch_takes_numpy,
    _transformer_engine_loads,
    _megatron_takes_transformer_engine,
)


def failures() -> list[str]:
    """What does not load, or does not work together; empty if nothing."""
    found = []
    for check in CHECKS:
        try:
            check()
        except Exception as error:  # whatever a loader, or a library's own check, raises
            name = check.__name__.removeprefix("_").replace("_", " ")
            text = f"not so: {name}: {type(error).__name__}: {error}"
            if DRIVER in str(error):
                sys.stderr.write(f"not tried here, for want of a driver: {text}\n")
                break  # the next would fail of the same
            found.append(text)
    return found


if __name__ == "__main__":
    environment = Path(sysconfig.get_path("data")).resolve()
    sys.exit("; ".join(problems(environment) or failures()) or None)
