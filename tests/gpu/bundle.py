"""Packs what a GPU machine without a network needs for `make test-gpu`: `make gpu-bundle`.

One file, with the sources and, unpacked, the packages that they import. The machine has Python,
torch, triton and transformers with what these install themselves; packages that no GPU test needs
stay behind, and so does transformer-engine, which is built for the machine's torch. There:

    tar -xf flagscale-gpu-tests.tar.xz && cd flagscale-gpu-tests && make test-gpu
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
NAME = "flagscale-gpu-tests"
MOST_BYTES = 60_000_000
# What torch, triton and transformers come with; numpy is the large one.
THERE = {
    *("torch", "triton", "transformers", "numpy", "tokenizers", "safetensors", "huggingface-hub"),
    *("filelock", "fsspec", "jinja2", "packaging", "pyyaml", "regex", "tqdm"),
}
# Sources on a hub, GGUF and parquet, tracking, Kubeflow, containers: no GPU test has them.
LEFT_OUT = {"datasets", "gguf", "pyarrow", "mlflow", "docker", "kfp", "kfp-kubernetes"}
LEFT_OUT |= {"kubernetes"}
# Tests; and what ModelOpt and flagscale.data import, but only others declare.
BESIDE = ("pytest", "pytest-timeout", "requests", "aiohttp")
# Glibc 2.28 or later, as NVIDIA's torch wants.
PLATFORMS = tuple(
    f"manylinux{glibc}_x86_64" for glibc in ("_2_28", "_2_27", "_2_24", "_2_17", "2014")
)


def packages(python: str) -> list[str]:
    """Names of the packages of the bundle, with all that they need, by what is installed here.

    Args:
        python: the machine's, e.g. 3.12.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    wanted = [Requirement(text).name for text in project["dependencies"]] + list(BESIDE)
    found: set[str] = set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in found | THERE | LEFT_OUT:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate(environment):
                wanted.append(needed.name)
    return sorted(found)


def install(names: Iterable[str], python: str, environment: Path) -> Path:
    """Unpack wheels for another machine, with the versions of constraints.txt.

    Args:
        names: of packages, without what they need.
        python: the machine's.
        environment: gets the folder that is returned.
    """
    target = environment / "lib" / f"python{python}" / "site-packages"
    options = ["--no-deps", "--no-compile", "--only-binary", ":all:", "--implementation", "cp"]
    options += ["--python-version", python, "--constraint", str(ROOT / "constraints.txt")]
    for platform in PLATFORMS:
        options += ["--platform", platform]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    subprocess.run([*pip, *options, "--target", str(target), *names], check=True)
    subprocess.run(["sh", str(ROOT / "images" / "prune.sh"), str(environment)], check=True)
    shutil.rmtree(target / "pulp" / "solverdir", ignore_errors=True)  # ModelOpt only imports it
    shutil.rmtree(target / "bin", ignore_errors=True)
    return target


def sources() -> list[Path]:
    """Files of the repository as they are, but for ignored and compiled ones, and pictures."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    return [
        path
        for path in paths
        if (ROOT / path).is_file()
        and not path.is_relative_to("pipelines/compiled")
        and path.suffix != ".png"
    ]


def pack(environment: Path, files: Iterable[Path], output: Path) -> None:
    """Write the bundle.

    Args:
        environment: of `install`; `packages/` in the bundle.
        files: of `sources`.
        output: a .tar.xz file.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(output, "w:xz", preset=6) as archive:
        for path in files:
            archive.add(ROOT / path, f"{NAME}/{path}")
        archive.add(environment, f"{NAME}/packages")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack sources and packages for make test-gpu.")
    parser.add_argument("--python", default="3.12", choices=("3.11", "3.12"))
    parser.add_argument("--output", type=Path, default=ROOT / "build" / f"{NAME}.tar.xz")
    options = parser.parse_args()
    names = packages(options.python)
    with tempfile.TemporaryDirectory() as folder:
        install(names, options.python, Path(folder))
        pack(Path(folder), sources(), options.output)
    size = options.output.stat().st_size
    told = f"{options.output}: {size / 1e6:.1f} MB, {len(names)} packages, Python {options.python}"
    if size > MOST_BYTES:
        sys.exit(f"{told}: more than {MOST_BYTES / 1e6:.0f} MB")
    sys.stdout.write(f"{told}\n")


if __name__ == "__main__":
    main()
