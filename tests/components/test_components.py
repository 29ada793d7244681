import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from kfp.dsl.base_component import BaseComponent

from components.__main__ import all_components, formatted
from components.documents import example, readme
from components.image import image

FOUND = all_components()
by_name = pytest.mark.parametrize(
    ("folder", "component"), list(FOUND.items()), ids=[folder.name for folder in FOUND]
)


def test_there_is_a_component_for_each_step() -> None:
    assert [folder.name for folder in FOUND] == [
        "cache_teacher",
        "check_recipe",
        "convert_student",
        "distil_student",
        "distil_student_on_nodes",
        "evaluate",
        "evaluate_tasks",
        "export_student",
        "export_winner",
        "leaderboard",
        "measure_layers",
        "pick_candidate",
        "prepare_data",
        "prepare_teacher",
        "promote",
        "rank_candidates",
        "record_many",
        "record_run",
    ]


@by_name
def test_the_readme_is_current(folder: Path, component: BaseComponent) -> None:
    text = (folder / "README.md").read_text()
    assert text == readme(folder, component), "run: python -m components"


def test_the_examples_are_current(tmp_path: Path) -> None:
    made = {folder: example(component) for folder, component in FOUND.items()}
    border = "# next\n"  # one process for all of them
    texts = formatted(border.join(made.values()).replace(border, f"\n{border}")).split(border)
    for folder, text in zip(made, texts, strict=True):
        written = (folder / "example_pipelines.py").read_text()
        assert written.strip() == text.strip(), "run: python -m components"


@by_name
def test_a_component_installs_nothing_and_uses_the_one_image(
    folder: Path, component: BaseComponent
) -> None:
    container = component.component_spec.implementation.container  # type: ignore[union-attr]
    assert container
    assert container.image == image()
    assert "pip install" not in " ".join(container.command or [])


@by_name
def test_the_body_is_imports_one_call_and_outputs(folder: Path, component: BaseComponent) -> None:
    module = sys.modules[f"components.{folder.parent.name}.{folder.name}.component"]
    tree = ast.parse(inspect.getsource(module))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    _, the_import, block = function.body  # docstring, import, with
    assert isinstance(the_import, ast.ImportFrom)
    assert isinstance(block, ast.With)
    work = [node for node in block.body if not isinstance(node, ast.ImportFrom)]
    assert len(work) <= 5
    name = f"flagscale.steps.{folder.name}"
    of_the_step = (name, f"{name}_alone")  # the step, or that it is all that its process does
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    (work_of_it,) = (i.names[0].name for i in imports if i.module in of_the_step)
    calls = [node for node in ast.walk(block) if isinstance(node, ast.Call)]
    step = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == work_of_it]
    assert len(step) == 1
    if folder.name != "check_recipe":  # which is given all that there is
        assert len(function.args.args) <= (15 if folder.name.endswith("on_nodes") else 14)


def test_importing_components_and_pipelines_loads_nothing_heavy() -> None:
    code = (
        "import sys, pipelines.__main__, components.__main__ as m; m.all_components()\n"
        "heavy = {'torch', 'megatron', 'modelopt', 'transformers', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
