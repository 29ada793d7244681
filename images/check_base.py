"""Refuses a base whose torch was replaced, or whose transformer-engine Megatron-Core does not take.

Run by the environment's own interpreter, while the GPU image is built.
"""

import importlib.metadata
import sys
import sysconfig
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


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


if __name__ == "__main__":
    sys.exit("; ".join(problems(Path(sysconfig.get_path("data")).resolve())) or None)
