"""Images, servers and runs for the container tests: `make test-containers`, as root.

A plain `pytest` leaves them out: they need podman, debootstrap and PostgreSQL, and minutes. Asked
for, they fail where one of these is missing.
"""

import json
import os
import pydoc_data.topics
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine, missing
from runs import Containers, Runs, Tracking
from servers import PostgreSQL, gate, mlflow_server

collect_ignore_glob = [] if os.environ.get("TEST_CONTAINERS") else ["test_*.py"]

TRAINING = ("training.train_iters=200", "training.save_interval=20", "training.eval_interval=50")


@pytest.fixture(scope="session")
def planted() -> dict[str, str]:
    """Secrets in the environment of the runs, made anew each time."""
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD")
    return {name: f"planted{secrets.token_hex(16)}" for name in names}


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A folder that the steps' user can enter, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="flagscale-containers-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def engine(place: Path) -> Iterator[Engine]:
    assert os.getuid() == 0, "the container tests run as root: podman makes containers for them"
    absent = missing()
    assert not absent, f"install what is missing ({', '.join(absent)}); .ci/run names the packages"
    folder = place / "engine"
    folder.mkdir()
    made = Engine(folder)
    service = made.start()
    yield made
    service.terminate()
    service.wait(timeout=60)


@pytest.fixture(scope="session")
def sets(place: Path, tiny_teacher: Path) -> tuple[str, ...]:
    """What both runs change of the recipe: text that does not depend on Python's version."""
    teacher, text = place / "teacher", place / "text.jsonl"
    shutil.copytree(tiny_teacher, teacher)
    subprocess.run(["chmod", "-R", "a+rX", teacher], check=True)
    lines = [json.dumps({"text": topic}) for topic in pydoc_data.topics.topics.values()]
    text.write_text("\n".join(lines), encoding="utf-8")
    return (f"teacher.source={teacher}", f"data.source={text}", *TRAINING)


@pytest.fixture(scope="session")
def started_reference(
    place: Path, sets: tuple[str, ...]
) -> Iterator[tuple[Runs, subprocess.Popen[str]]]:
    """The same run with steps as processes; it goes on while the images are built."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    runs = Runs(place / "reference", sets, outside)
    process = runs.start()
    yield runs, process
    if process.poll() is None:  # the images could not be built
        process.terminate()
        process.communicate()


@pytest.fixture(scope="session")
def images(engine: Engine, started_reference: tuple[Runs, subprocess.Popen[str]]) -> dict[str, str]:
    engine.make_base()
    return engine.build("cpu", "mlflow")


@pytest.fixture(scope="session")
def reference(started_reference: tuple[Runs, subprocess.Popen[str]]) -> Runs:
    runs, process = started_reference
    assert runs.end(process) == 0, runs.outputs[-1]
    return runs


@pytest.fixture(scope="session")
def tracking(
    place: Path, engine: Engine, images: dict[str, str], planted: dict[str, str]
) -> Iterator[Tracking]:
    database = PostgreSQL(place / "postgresql", planted["PGPASSWORD"])
    artifacts = place / "artifacts"
    try:
        with (
            mlflow_server(engine, images["mlflow"], database, artifacts) as inner,
            gate(inner, "distil", planted["MLFLOW_TRACKING_PASSWORD"]) as port,
        ):
            yield Tracking(f"http://127.0.0.1:{port}", database, artifacts)
    finally:
        database.stop()


@pytest.fixture(scope="session")
def tracked(engine: Engine, planted: dict[str, str], tracking: Tracking) -> dict[str, str]:
    """The environment of runs that track there."""
    return {
        **engine.environment,
        "MLFLOW_TRACKING_URI": tracking.uri,
        "MLFLOW_TRACKING_USERNAME": "distil",
        "MLFLOW_TRACKING_PASSWORD": planted["MLFLOW_TRACKING_PASSWORD"],
    }


@pytest.fixture(scope="session")
def contained(
    place: Path,
    engine: Engine,
    images: dict[str, str],
    sets: tuple[str, ...],
    planted: dict[str, str],
    tracked: dict[str, str],
) -> Containers:
    """A training killed with -9, then stopped by SIGTERM, then let be, each in a container."""
    environment = {**tracked, **planted}
    del environment["PGPASSWORD"]  # the server's own
    runs = Containers(place / "runs", sets, environment, images["cpu"], engine=engine)
    for blow in (signal.SIGKILL, signal.SIGTERM, None):
        process = runs.start()
        if blow is not None:
            step = runs.wait_for_checkpoint(process)
            if not runs.status:
                runs.look_at(step)
            (step if blow == signal.SIGKILL else process).send_signal(blow)
        runs.exits.append(runs.end(process))
        runs.left.append(len(runs.steps()))
    return runs
