"""What `make gpu-bundle` packs, without asking a package index."""

import importlib.util
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "tests" / "gpu" / "bundle.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_package_is_pinned_and_the_machines_own_stay(bundle: ModuleType, python: str) -> None:
    names = bundle.packages(python)
    assert {"megatron-core", "nvidia-modelopt", "scipy", "pydantic-core", "pytest"} <= set(names)
    assert not {"torch", "numpy", "transformers", "transformer-engine", "pyarrow"} & set(names)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert set(names) - pinned <= {"setuptools"}


def test_no_step_imports_what_is_left_out(bundle: ModuleType) -> None:
    """As on the GPU machine: whatever loads one of them cannot run there."""
    steps = ("prepare_data", "prepare_teacher", "convert_student", "distil_student", "evaluate")
    code = (
        "import importlib, sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name in {sorted(n.replace('-', '_') for n in bundle.LEFT_OUT)}:\n"
        "            raise SystemExit(f'{name} is imported')\n"
        "import transformers.utils.import_utils as found\n"  # it looks for some by their names
        "found.is_datasets_available = lambda: False\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"for step in {(*steps, 'export_student')}:\n"
        "    importlib.import_module(f'flagscale.steps.{step}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_there_make_test_gpu_takes_the_bundles_packages(bundle: ModuleType, tmp_path: Path) -> None:
    """Where it says that there is no torch, or another Python, it says so in a line."""
    here = "python{}.{}".format(*sys.version_info)
    packages = tmp_path / "packages" / "lib" / here / "site-packages"
    packages.mkdir(parents=True)
    for name in ("torch", "transformers"):
        (packages / f"{name}.py").write_text("")
    bundle.pack(tmp_path / "packages", bundle.sources(), tmp_path / "bundle.tar.xz")
    with tarfile.open(tmp_path / "bundle.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / bundle.NAME
    assert (folder / "tests" / "gpu" / "test_steps_gpu.py").is_file()
    assert (folder / "flagscale" / "megatron" / "platform.py").is_file()
    assert not list(folder.rglob("*.png"))
    make = ["make", "--dry-run", "test-gpu", f"PYTHON={sys.executable}"]
    shown = subprocess.run(make, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert f"PYTHONPATH={folder}:{folder}/packages/lib/{here}/site-packages" in shown
    assert "pip" not in shown
    (folder / "packages" / "lib" / here).rename(folder / "packages" / "lib" / "python3.9")
    make.remove("--dry-run")
    done = subprocess.run(make, cwd=folder, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"this bundle is for python3.9, and {sys.executable} is {here}" in done.stderr
