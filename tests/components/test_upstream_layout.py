"""The layout that kubeflow/pipelines-components asks for, by its rules of September 2026.

docs/CONTRIBUTING.md, scripts/validate_metadata and .github/scripts/check_imports there. One rule
is not kept: upstream's images are published by its own CI. Ours is named in `components/image.py`,
the one import beside KFP's that a component has at its top.
"""

import ast
import importlib
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kfp import compiler

from components.__main__ import all_components
from pipelines.compiling import LOADER

FOUND = all_components()
folders = pytest.mark.parametrize("folder", list(FOUND), ids=lambda folder: folder.name)
CATEGORIES = {"data_processing", "deployment", "evaluation", "monitoring", "training"}
DEPENDENCY = {
    "type": "object",
    "required": ["name", "version"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "version": {"pattern": r"^(==|>=|<=|~=)?\d+\.\d+\.\d+$"},
    },
}
KUBEFLOW = {
    "type": "array",
    "items": DEPENDENCY,
    "contains": {"properties": {"name": {"const": "Pipelines"}}},
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["name", "stability", "dependencies", "lastVerified"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "stability": {"enum": ["alpha", "beta", "stable"]},
        "dependencies": {
            "type": "object",
            "required": ["kubeflow"],
            "additionalProperties": False,
            "properties": {
                "kubeflow": KUBEFLOW,
                "external_services": {"type": "array", "items": DEPENDENCY},
            },
        },
        "lastVerified": {},
        "tags": {"type": "array", "items": {"type": "string"}},
        "ci": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"skip_dependency_probe": {"type": "boolean"}},
        },
        "links": {"type": "object"},
    },
}


@folders
def test_the_folder_has_what_is_required_in_a_category_that_there_is(folder: Path) -> None:
    assert folder.parent.name in CATEGORIES
    assert (folder.parent / "__init__.py").exists()
    files = {"__init__.py", "component.py", "metadata.yaml", "README.md", "OWNERS"}
    files |= {"example_pipelines.py"}
    assert files <= {path.name for path in folder.iterdir()}
    package = importlib.import_module(f"components.{folder.parent.name}.{folder.name}")
    assert package.__all__ == [folder.name]
    assert getattr(package, folder.name) is FOUND[folder]


def test_no_component_lies_outside_of_a_category() -> None:
    root = next(iter(FOUND)).parents[1]
    assert sorted(root.rglob("component.py")) == sorted(folder / "component.py" for folder in FOUND)


@folders
def test_metadata_and_owners_are_valid(folder: Path) -> None:
    facts = yaml.safe_load((folder / "metadata.yaml").read_text())
    jsonschema.validate(facts, SCHEMA)
    assert facts["name"] == folder.name
    assert isinstance(facts["lastVerified"], datetime)
    assert facts["lastVerified"] <= datetime.now(UTC)
    owners = yaml.safe_load((folder / "OWNERS").read_text())
    assert set(owners) <= {"approvers", "reviewers"}
    assert owners["approvers"]
    assert all(isinstance(name, str) for names in owners.values() for name in names)


@folders
def test_modules_import_nothing_at_their_top_but_the_standard_library_and_kfp(folder: Path) -> None:
    allowed = {*sys.stdlib_module_names, "kfp", "components.image", ".component"}
    allowed.add(f"components.{folder.parent.name}.{folder.name}.component")
    for file in folder.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = ["." * node.level + (node.module or "")]
            assert {*names} <= allowed, file


@folders
def test_the_example_compiles(folder: Path, tmp_path: Path) -> None:
    name = f"components.{folder.parent.name}.{folder.name}.example_pipelines"
    example = getattr(importlib.import_module(name), f"{folder.name}_example")
    path = tmp_path / "example.yaml"
    compiler.Compiler().compile(example, str(path))
    spec = next(yaml.load_all(path.read_text(), LOADER))
    tasks = spec["root"]["dag"]["tasks"]
    step = FOUND[folder].name
    assert tasks[step]["componentRef"]["name"] == f"comp-{step}"
    others = {task["componentRef"]["name"] for name, task in tasks.items() if name != step}
    assert all(other.startswith(("comp-importer", "comp-for-loop")) for other in others)
