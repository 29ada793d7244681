"""The local runner with a loop in the pipeline: names, failures, signals, reuse."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from toy import make, toy, toy_sweep

from flagscale.execution.notes import FOLDER_VARIABLE
from flagscale.recipe import load_recipe
from pipelines.distillation import build_pipeline
from pipelines.local.output import quiet_kfp
from pipelines.local.step_cache import kfp_local
from pipelines.local.steps import Plan, RunResult, Steps
from pipelines.local.stopping import Stopper
from pipelines.outcome import WITHOUT_A_WORD, StepGone

TOY = Path(__file__).with_name("toy.py")
QUICK = {"steps": 2, "seconds": 0.01}
SLOW = {"steps": 400, "seconds": 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start(runs: Path, **options: dict[str, Any]) -> subprocess.Popen[str]:
    """A sweep whose variants are the keywords."""
    variants = [
        {"name": name, "options": values, "checkpoints": str(runs / "checkpoints" / name)}
        for name, values in options.items()
    ]
    return subprocess.Popen(
        [sys.executable, str(TOY), str(runs), json.dumps({"variants": variants})],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    out, _ = process.communicate(timeout=300)
    return process.returncode, [line for line in out.splitlines() if line]


def told(lines: list[str]) -> list[str]:
    """The runner's own lines, without times."""
    own = [line for line in lines if line.startswith("[") and " ..." not in line]
    return [line.split(" in ")[0].split(", made")[0] for line in own]


def test_steps_of_a_loop_say_whose_they_are(runs: Path) -> None:
    code, lines = end(start(runs, one=QUICK, two={**QUICK, "steps": 3}))
    assert code == 0, lines
    assert told(lines) == [
        "[1/4] make done",
        "[2/4] train (one) done",
        "[3/4] train (two) done",
        "[4/4] choose done",
    ]
    facts = json.loads((runs / "latest" / "summary.json").read_text())["steps"]
    assert list(facts) == ["make", "train-1", "train-2", "choose"]
    assert facts["train-2"]["variant"] == "two"
    for link in ("model-1", "model-2"):
        assert (runs / "latest" / link / "weights").exists()
    outputs = {step["outputs"].get("model") for step in facts.values()}
    assert len(outputs) == 3  # two folders, and None
    metrics = json.loads(Path(facts["choose"]["outputs"]["choice_metrics"]).read_text())
    assert metrics["models"] == 2.0
    assert any(line.split() == ["train-2", *line.split()[1:3], "two"] for line in lines)


def test_nothing_starts_after_a_variant_that_failed(runs: Path) -> None:
    bad = {**QUICK, "fail": True}
    code, lines = end(start(runs, first={**QUICK, "steps": 1}, bad=bad, late={**QUICK, "steps": 4}))
    assert code == 1
    assert lines[-1] == "error: train (bad) failed: options.fail: must be false"
    assert told(lines) == ["[1/5] make reused from cache", "[2/5] train (first) done"]
    assert not any("late" in line for line in lines)
    assert not (runs / "checkpoints" / "late").exists()
    assert "Traceback" not in "\n".join(lines)


def test_a_signal_in_a_loop_stops_the_sweep_and_the_next_run_goes_on(runs: Path) -> None:
    done = runs / "checkpoints" / "slow" / "done"
    process = start(runs, one=QUICK, slow=SLOW, never=SLOW)
    deadline = time.monotonic() + 300
    while not done.exists() or int(done.read_text() or 0) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.terminate()
    code, lines = end(process)
    assert code == 143, lines
    assert lines[-1] == "train (slow) was stopped by SIGTERM; the same command goes on from there"
    assert not (runs / "checkpoints" / "never").exists()

    step = int(done.read_text())
    code, lines = end(start(runs, one=QUICK, slow={**SLOW, "steps": step + 1}))
    assert code == 0, lines
    assert "[2/4] train (one) reused from cache" in told(lines)
    assert any(line.endswith(f" from step {step}") for line in lines)


class Full:
    """An observer who has no room for a note."""

    def started(self, name: str) -> None:
        raise OSError(f"no room for {name}")

    def reused(self, name: str, outputs: Mapping[str, Path]) -> None:
        raise AssertionError

    def finished(self, name: str, outputs: Mapping[str, Path], gave_values: bool) -> None:
        raise AssertionError


def test_what_is_raised_in_a_loop_is_told(tmp_path: Path) -> None:
    """KFP only logs it, and raises that the pipeline has failed."""
    pipeline = dsl.pipeline(name="loop")(loop)
    log = tmp_path / "run.log"
    with (
        quiet_kfp(log) as exceptions,
        kfp_local(tmp_path / "artifacts", tmp_path / "cache", Full(), reuse=True),
        pytest.raises(RuntimeError) as failed,
    ):
        pipeline()
    steps = Steps(RunResult(tmp_path, ""), None, Stopper(), Plan(pipeline, {}))
    told = str(steps.failure(failed.value, exceptions))
    assert told == "the run ended after no step: no room for make"
    assert "no room for make" in log.read_text()


def test_what_follows_from_a_container_that_is_gone_is_not_its_reason(tmp_path: Path) -> None:
    stopper = Stopper()
    steps = Steps(RunResult(tmp_path, ""), None, stopper, Plan(dsl.pipeline(name="l")(loop), {}))
    missed = ["Tried to get output 'student' from task 'train', but task 'train' not found."]
    for error, reason in ((StepGone(), WITHOUT_A_WORD), (RuntimeError("failed"), missed[0])):
        stopper.step_folder = tmp_path  # of a step that has not ended well, and noted nothing
        assert str(steps.failure(error, missed)).endswith(f" failed: {reason}")


def loop() -> None:
    with dsl.ParallelFor([{"fail": ""}, {"fail": "user"}], parallelism=1) as item:
        make(fail=item.fail)


@pytest.mark.parametrize(
    ("pipeline", "arguments", "total"),
    [(toy, {}, 2), (toy_sweep, {"variants": [{"name": "a"}, {"name": "b"}, {}]}, 5)],
)
def test_the_plan_counts_loops(
    pipeline: BaseComponent, arguments: dict[str, Any], total: int
) -> None:
    plan = Plan(pipeline, arguments)
    assert plan.total == total
    assert plan.turn("make") == ("make", "")
    if arguments:
        assert turns(plan, "train", 3) == [("train-1", "a"), ("train-2", "b"), ("train-3", "3")]


def turns(plan: Plan, name: str, count: int) -> list[tuple[str, str]]:
    """What a step is called each time that it runs."""
    found = []
    for _ in range(count):
        found.append(plan.turn(name))
        plan.ended(name)
    return found


def test_the_plan_counts_a_sweep_with_its_check() -> None:
    recipe = load_recipe("recipes/tiny-sweep.yaml")
    plan = Plan(build_pipeline(recipe), {})
    names = [variant.name for variant in recipe.variants]
    assert plan.total == 5 + 3 * len(names)
    assert turns(plan, "evaluate", 2) == [("evaluate-1", names[0]), ("evaluate-2", names[1])]


def test_the_plan_counts_the_rungs_of_a_search() -> None:
    recipe = load_recipe("recipes/tiny-search.yaml")
    assert recipe.search is not None
    plan = Plan(build_pipeline(recipe), {})
    names = [variant.name for variant in recipe.variants]
    slots = recipe.search.slots_of(len(names))
    assert slots == (6, 3, 2)
    # check, data, teacher, layers; a conversion and a training each; a pick and a training a slot;
    # three rankings; pick, training, evaluation and export of the winner.
    assert plan.total == 4 + 2 * 6 + 2 * (3 + 2) + 3 + 4
    first = turns(plan, "distil-student", 6)
    assert first[1] == ("distil-student-2", f"rung 1, {names[1]}")
    assert turns(plan, "distil-student-2", 3)[2] == ("distil-student-9", "rung 2, slot 3")
    assert turns(plan, "distil-student-3", 2)[0] == ("distil-student-10", "rung 3, slot 1")
    assert plan.turn("distil-student-4") == ("distil-student-12", "")
    assert plan.turn("evaluate") == ("evaluate", "")
    assert turns(plan, "rank-candidates", 1) == [("rank-candidates-1", "")]
    assert plan.turn("rank-candidates-2") == ("rank-candidates-2", "")


class Untracked:
    """A run in MLflow of which nothing is kept."""

    def reuse(self, *facts: object) -> None:
        pass

    def newest_child(self, step: str) -> None:
        pass


def test_a_student_that_is_picked_is_linked_as_what_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both steps have an output `student`, whether they run or are reused."""
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    plan = Plan(build_pipeline(load_recipe("recipes/tiny-search.yaml")), {})
    result = RunResult(tmp_path / "run", "")
    steps = Steps(result, Untracked(), Stopper(), plan)
    converted = [tmp_path / f"convert-{number}" / "student" for number in range(6)]
    picked = [tmp_path / f"pick-{number}" / "student" for number in range(2)]
    for path in (result.folder, *converted, *picked):
        path.mkdir(parents=True)
    for path in converted:
        steps.reused("convert-student", {"student": path})
    steps.reused("pick-candidate", {"student": picked[0]})
    steps.started("pick-candidate")
    steps.finished("pick-candidate", {"student": picked[1]}, gave_values=False)
    links = {path.name: path.resolve() for path in result.folder.iterdir() if path.is_symlink()}
    assert links == {f"student-{number}": path for number, path in enumerate(converted, 1)}
    assert list(result.steps)[-2:] == ["pick-candidate-1", "pick-candidate-2"]


@pytest.mark.parametrize(("loop_ends", "told"), [(True, ["no room"]), (False, [])])
def test_what_follows_from_a_step_that_failed_is_not_its_reason(
    tmp_path: Path, loop_ends: bool, told: list[str]
) -> None:
    with quiet_kfp(tmp_path / "run.log") as exceptions:
        code = "import logging\n" + "logging.error('Task a finished with status FAILURE')\n" * (
            not loop_ends
        )
        code += "logging.error('Task loop failed with exception: no room')"
        exec(compile(code, "/site-packages/kfp/local/some.py", "exec"))
    assert exceptions == told
