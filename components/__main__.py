"""Writes each component's README and example from its signature: `python -m components`.

The folders are laid out as kubeflow/pipelines-components asks: `CATEGORY/NAME/` with
`component.py`, `metadata.yaml`, `OWNERS`, `README.md`, `example_pipelines.py` and `tests/`. Where
metadata and owners are missing, of a new component, they are made too, to be looked through.
"""

import importlib
import subprocess
import sys
from pathlib import Path

from kfp.dsl.base_component import BaseComponent

import components
from components.documents import example, metadata, readme

_OWNERS = "approvers:\n  - flagscale-distillation-maintainers\n"


def all_components() -> dict[Path, BaseComponent]:
    """Folder -> component, in alphabetical order of their names."""
    found = {}
    root = Path(components.__path__[0])
    for file in sorted(root.glob("*/*/component.py"), key=lambda path: path.parent.name):
        name, category = file.parent.name, file.parents[1].name
        loaded = importlib.import_module(f"components.{category}.{name}.component")
        found[file.parent] = getattr(loaded, name)
    return found


def formatted(code: str) -> str:
    """As the linter wants it."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "example.py", "-"]
    return subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout  # noqa: S603


def _main() -> int:
    for folder, component in all_components().items():
        for name, text in (("metadata.yaml", metadata(folder)), ("OWNERS", _OWNERS)):
            if not (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")
        code = formatted(example(component))
        (folder / "example_pipelines.py").write_text(code, encoding="utf-8")
        (folder / "README.md").write_text(readme(folder, component), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
