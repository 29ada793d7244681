"""A tiny teacher and the artifacts of a tiny run, made once by the real steps."""

import importlib.util
import inspect
import json
import os
import pydoc_data.topics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from flagscale.recipe import DataRecipe, StudentRecipe, TeacherRecipe

if TYPE_CHECKING:
    from browser import Browser

# Threads of tiny models wait for each other longer than they work, above all on a busy machine.
# Before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def is_installed(name: str) -> bool:
    """All is, but on a GPU machine with the bundle of `make gpu-bundle` alone."""
    return importlib.util.find_spec(name) is not None


if is_installed("hypothesis"):
    import hypothesis

    # CI tries the same examples every time; people's runs look for new ones.
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
    hypothesis.settings.register_profile("people", deadline=None)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "people")

if is_installed("kfp"):
    import kfp.dsl.pipeline_task

    # KFP asks for its caller's name with `inspect.stack()` at each setting of each task. That reads
    # the source of every frame, and looks through all modules for that of pytest-xdist's, which is
    # in no file: seconds a pipeline once torch is loaded. Names are enough.
    kfp.dsl.pipeline_task.inspect = SimpleNamespace(stack=lambda: inspect.stack(context=0))

SEQ_LENGTH = 64


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """The environment as it was: MLflow keeps its tracking server there, for one."""
    before = dict(os.environ)
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:
    from browser import PROGRAM, browsed

    if PROGRAM is None and os.environ.get("CI") != "true":  # there it must be
        pytest.skip("needs Chromium (Debian: chromium)")
    with browsed(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny trained Llama and its tokenizer."""
    path = Path(__file__).with_name("tiny_teacher.py")
    spec = importlib.util.spec_from_file_location("tiny_teacher", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tiny-teacher")
    module.make_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def dataset(artifacts: Path, tiny_teacher: Path) -> Path:
    from flagscale.steps.prepare_data import prepare_data

    corpus = artifacts / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for text in pydoc_data.topics.topics.values()]
    corpus.write_text("\n".join(lines))
    recipe = DataRecipe(
        source=str(corpus),
        tokenizer=str(tiny_teacher),
        seq_length=SEQ_LENGTH,
        validation_fraction=0.1,
        test_fraction=0.1,
        workers=1,
    )
    prepare_data(recipe, artifacts / "dataset")
    return artifacts / "dataset"


@pytest.fixture(scope="session")
def teacher(artifacts: Path, dataset: Path, tiny_teacher: Path) -> Path:
    from flagscale.steps.prepare_teacher import prepare_teacher

    prepare_teacher(TeacherRecipe(source=str(tiny_teacher)), dataset, artifacts / "teacher")
    return artifacts / "teacher"


@pytest.fixture(scope="session")
def student(artifacts: Path, dataset: Path, teacher: Path) -> Path:
    """The teacher's layers 0 and 3."""
    from flagscale.steps.convert_student import convert_student

    recipe = StudentRecipe(init="depth", num_layers=2)
    convert_student(recipe, teacher, dataset, artifacts / "student")
    return artifacts / "student"
