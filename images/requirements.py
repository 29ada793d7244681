"""What an image installs, pinned: `python3 images/requirements.py FOLDER [--keep-base]`.

Writes `requirements.txt`, the project's dependencies, and `constraints.txt`, the lock. With
`--keep-base` the packages that NVIDIA's image was built around (torch, transformer-engine, what
they link to) are pinned to the versions of the interpreter that runs this, so that pip leaves them
as they are. Needs Python 3.11 and nothing else.
"""

import argparse
import importlib.metadata
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
# They are compiled for one another: none can be replaced alone.
_OF_THE_BASE = re.compile(
    r"(torch|torchvision|torchaudio|(pytorch-)?triton|transformer-engine.*|flash-attn|apex"
    r"|cuda-.*|nvidia-(?!modelopt$|ml-py$).*)"
)


def normal(requirement: str) -> str:
    """The package's name as PyPI compares it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    if name is None:
        raise ValueError(f"{requirement!r} names no package")
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def requirements(project: dict, extras: Iterable[str], keep_base: bool) -> list[str]:
    """The project's dependencies, and those of its extras, without what the base brings.

    Args:
        project: `[project]` of pyproject.toml.
        extras: of its optional dependencies.
        keep_base: leave out what belongs to the base.

    Raises:
        KeyError: there is no such extra.
    """
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return [text for text in wanted if not (keep_base and _OF_THE_BASE.fullmatch(normal(text)))]


def constraints(lock: Iterable[str], installed: dict[str, str], keep_base: bool) -> list[str]:
    """The lock, in which the base's own packages have the base's versions.

    Args:
        lock: lines `name==version`.
        installed: name -> version of what the base has.
        keep_base: whether anything of it is kept.
    """
    pins = {normal(line): line.strip() for line in lock if line.strip()}
    if keep_base:
        pins = {name: pin for name, pin in pins.items() if not _OF_THE_BASE.fullmatch(name)}
        for name, version in installed.items():
            if _OF_THE_BASE.fullmatch(normal(name)):
                pins[normal(name)] = f"{normal(name)}=={version}"
    return [pins[name] for name in sorted(pins)]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extras", nargs="*", default=[])
    parser.add_argument("--keep-base", action="store_true")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt", Path(__file__).with_name("build-constraints.txt"))
    lock = [line for path in pins for line in path.read_text(encoding="utf-8").splitlines()]
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    files = {
        "requirements.txt": requirements(project, arguments.extras, arguments.keep_base),
        "constraints.txt": constraints(lock, installed, arguments.keep_base),
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (arguments.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
