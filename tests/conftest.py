"""A tiny teacher and the artifacts of a tiny run, made once by the real steps."""

import fcntl
import gc
import importlib.util
import json
import os
import pydoc_data.topics
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from flagscale.recipe import DataRecipe, StudentRecipe, TeacherRecipe
from tests.flagscale.fork_server import ForkServer

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

    # KFP asks for its caller's name with `inspect.stack()[1][3]` at each setting of each task. That
    # reads the source of every frame, and looks through all modules for those that are in no file:
    # seconds a pipeline once torch is loaded. Names are enough.
    def names_of_callers() -> list[tuple[None, None, None, str]]:
        frame = sys._getframe(1)
        return [(None, None, None, at.f_code.co_name) for at in (frame, frame.f_back)]

    kfp.dsl.pipeline_task.inspect = SimpleNamespace(stack=names_of_callers)

SEQ_LENGTH = 64
# What takes longest begins first, or one worker ends long after the others. Longest first.
LONGEST = (
    "pipelines/local/test_end_to_end.py",
    "pipelines/local/test_sweep_end_to_end.py",
    "flagscale/execution/test_trainjob_training.py",
    "flagscale/sizes/test_model_steps_memory.py",
    "flagscale/sizes/test_training_memory.py",
    "flagscale/tracking/test_outage.py",
    "flagscale/execution/test_trainjob.py",
    "flagscale/steps/test_pods.py",
    "flagscale/train/test_layouts.py",
    "pipelines/local/test_local.py",
    "flagscale/execution/test_launch.py",
    "flagscale/train/checkpoints/test_resume_layouts.py",
    "flagscale/train/test_divergences_on_layouts.py",
    "flagscale/steps/test_family_on_ranks.py",
    "flagscale/steps/test_quantized_student.py",
    "flagscale/steps/test_evaluate_tasks.py",
    "flagscale/steps/test_step_imports.py",
    "flagscale/train/test_loop.py",
    "flagscale/steps/test_prepare_teacher.py",
    "flagscale/models/test_planted_defects.py",
    "pipelines/cluster/test_cluster_checks.py",
    "pipelines/local/test_local_loops.py",
    "flagscale/steps/test_export_student.py",
    "flagscale/train/test_cached_teacher.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of workers alone: what somebody runs by hand keeps its order."""
    if hasattr(config, "workerinput"):
        places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """What is imported stays: garbage is looked for in what comes after, not there each time."""
    gc.freeze()


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
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what is made once, whatever the number of workers: nobody changes it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "artifacts"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """A folder or file, made by the worker that comes first; the others wait for it."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = path.with_suffix(".done")
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)  # of a worker that failed
            make(path)
            done.touch()
    return path


@pytest.fixture(scope="session")
def made_store(of_all_workers: Path) -> Path:
    """A database with MLflow's tables, which take a second to make, and nothing in it."""

    def make(path: Path) -> None:
        import mlflow

        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()

    return made_once(of_all_workers / "empty.db", make)


@pytest.fixture
def empty_store(made_store: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(made_store, tmp_path / "mlflow.db"))


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("fork-server"))
    yield server
    server.close()


@pytest.fixture
def python(fork_server: ForkServer) -> Callable[..., list[str]]:
    """The command of a Python that has imported what steps import: `python("-c", CODE, ...)`."""
    return fork_server.python


@pytest.fixture(scope="session")
def tiny_teacher(of_all_workers: Path) -> Path:
    """Folder of a tiny trained Llama and its tokenizer."""

    def make(folder: Path) -> None:
        path = Path(__file__).with_name("tiny_teacher.py")
        spec = importlib.util.spec_from_file_location("tiny_teacher", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.make_teacher(folder)

    return made_once(of_all_workers / "tiny-teacher", make)


@pytest.fixture(scope="session")
def artifacts(of_all_workers: Path) -> Path:
    """Where `dataset`, `teacher` and `student` lie."""
    return of_all_workers


@pytest.fixture(scope="session")
def dataset(artifacts: Path, tiny_teacher: Path) -> Path:
    from flagscale.steps.prepare_data import prepare_data

    def make(folder: Path) -> None:
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
        prepare_data(recipe, folder)

    return made_once(artifacts / "dataset", make)


@pytest.fixture(scope="session")
def teacher(artifacts: Path, dataset: Path, tiny_teacher: Path) -> Path:
    from flagscale.steps.prepare_teacher import prepare_teacher

    recipe = TeacherRecipe(source=str(tiny_teacher))
    return made_once(artifacts / "teacher", lambda folder: prepare_teacher(recipe, dataset, folder))


@pytest.fixture(scope="session")
def student(artifacts: Path, dataset: Path, teacher: Path) -> Path:
    """The teacher's layers 0 and 3."""
    from flagscale.steps.convert_student import convert_student

    recipe = StudentRecipe(init="depth", num_layers=2)
    return made_once(
        artifacts / "student", lambda folder: convert_student(recipe, teacher, dataset, folder)
    )
