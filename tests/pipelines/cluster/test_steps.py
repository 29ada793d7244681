"""A line a step, from what real servers answered and from what the acting one does."""

import random

import pytest
import yaml
from kfp_server_api import PipelineTaskDetailChildTask

from pipelines.cluster.definition import Definition
from pipelines.cluster.steps import read_steps
from tests.pipelines.cluster.argo_nodes import tasks
from tests.pipelines.cluster.kfp_runs import read_tasks, real_run
from tests.pipelines.cluster.runs import pipeline

THREE = ("prepare-data", "prepare-teacher", "convert-student")


def training(retries: int) -> Definition:
    """A pipeline of which only the training's retries are known."""
    return Definition(pipeline(distil_student=retries, distil_student_on_nodes=retries))


def brief(name: str, definition: Definition) -> list[tuple[str, str, int | None, str]]:
    steps = read_steps(real_run(name).run_details.task_details, definition)
    return [
        (s.label, s.state, None if s.seconds is None else round(s.seconds), s.count())
        for s in steps
    ]


def test_a_real_run_that_succeeded() -> None:
    assert brief("succeeded", training(5)) == [
        ("prepare-data", "SUCCEEDED", 17, ""),
        ("prepare-teacher", "SUCCEEDED", 14, ""),
        ("convert-student", "SUCCEEDED", 15, ""),
        ("distil-student", "SUCCEEDED", 16, ""),
        ("evaluate", "SUCCEEDED", 18, ""),
        ("export-student", "SUCCEEDED", 20, ""),
    ]


def test_a_real_run_of_the_cache() -> None:
    expected = [*THREE, "distil-student", "evaluate", "export-student"]
    assert brief("cached", training(5)) == [(name, "CACHED", None, "") for name in expected]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("stopped-not-retried", ("distil-student", "FAILED", 57, "")),
        ("mistake-not-retried", ("distil-student", "FAILED", 10, "")),
    ],
)
def test_a_real_run_that_failed_at_once(name: str, step: tuple[str, str, int, str]) -> None:
    assert brief(name, training(5)) == [*((name, "CACHED", None, "") for name in THREE), step]


def test_a_real_run_that_was_begun_anew_again_and_again() -> None:
    """Afterwards the whole run was, and then no driver could prepare its second step."""
    assert brief("mistake-retried", training(5)) == [
        ("prepare-data", "CACHED", None, ""),
        ("prepare-teacher", "FAILED", None, "KFP's driver failed before it began"),
        ("convert-student", "CACHED", None, ""),
        ("distil-student", "FAILED", 913, "attempt 6 of 6 (18 in all)"),
    ]


def test_a_real_training_on_two_nodes_that_went_on() -> None:
    found = brief("two-nodes-one-stopped", training(5))
    assert found[3] == ("distil-student-on-nodes", "SUCCEEDED", 216, "attempt 5 of 6")
    steps = read_steps(real_run("two-nodes-one-stopped").run_details.task_details, training(5))
    assert [a.state for a in steps[3].attempts] == ["FAILED"] * 4 + ["SUCCEEDED"]


def test_a_real_sweep_by_its_variants_names() -> None:
    with open("pipelines/compiled/tiny-sweep-gke-h100.yaml", encoding="utf-8") as file:
        spec = next(iter(yaml.load_all(file, yaml.CSafeLoader)))
    found = brief("sweep", Definition(spec))
    assert [(label, state) for label, state, _, _ in found] == [
        ("prepare-data", "SUCCEEDED"),
        ("prepare-teacher", "SUCCEEDED"),
        ("convert-student [num_layers=2 temperature=1.0]", "SUCCEEDED"),
        ("convert-student [num_layers=2 temperature=2.0]", "SUCCEEDED"),
        ("distil-student [num_layers=2 temperature=1.0]", "SUCCEEDED"),
        ("distil-student [num_layers=2 temperature=2.0]", "SUCCEEDED"),
        ("evaluate [num_layers=2 temperature=1.0]", "SUCCEEDED"),
        ("evaluate [num_layers=2 temperature=2.0]", "SUCCEEDED"),
        ("convert-student [num_layers=3 temperature=1.0]", "RUNNING"),
        ("convert-student [num_layers=3 temperature=2.0]", "RUNNING"),
    ]
    # Two at a time: what ran side by side is not taken for one another's.
    assert [seconds for _, _, seconds, _ in found[6:8]] == [161, 172]


def test_a_sweep_whose_pipeline_is_gone_is_numbered() -> None:
    labels = [label for label, *_ in brief("sweep", Definition())]
    assert labels[-2:] == ["convert-student [3]", "convert-student [4]"]


@pytest.mark.parametrize(
    ("said", "state", "count"),
    [
        ("DRIVER", "PENDING", ""),
        ("PENDING", "PENDING", ""),
        ("RUNNING", "RUNNING", ""),
        (["FAILED", "RUNNING"], "RUNNING", "attempt 2 of 6"),
        (["FAILED", "FAILED", "BACKOFF"], "RETRYING", "attempt 2 of 6"),
        (["FAILED", "SUCCEEDED"], "SUCCEEDED", "attempt 2 of 6"),
        ([["FAILED"] * 6, ["FAILED", "RUNNING"]], "RUNNING", "attempt 2 of 6 (8 in all)"),
        ("BROKEN", "FAILED", "KFP's driver failed before it began"),
    ],
)
def test_the_state_of_a_step(said: str | list[str], state: str, count: str) -> None:
    details = read_tasks(tasks(prepare_data="SUCCEEDED", distil_student=said))
    steps = read_steps(details, training(5))
    assert [(s.label, s.state) for s in steps] == [
        ("prepare-data", "SUCCEEDED"),
        ("distil-student", state),
    ]
    assert steps[1].count() == count


def test_steps_that_were_left_out_are_no_steps_of_this_run() -> None:
    details = read_tasks(tasks(prepare_data="FAILED", prepare_teacher="LEFT OUT"))
    assert [s.label for s in read_steps(details, Definition())] == ["prepare-data"]


def test_a_server_that_does_not_tell_what_is_in_what() -> None:
    details = read_tasks(tasks(prepare_data="SUCCEEDED", distil_student=["FAILED", "RUNNING"]))
    for detail in details:
        detail.child_tasks = None
    steps = read_steps(details, training(5))
    assert [(s.label, s.state) for s in steps] == [
        ("prepare-data", "SUCCEEDED"),
        ("distil-student", "RUNNING"),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_answers_with_gaps_are_read_as_far_as_they_go(seed: int) -> None:
    """Whatever a server leaves out, or names otherwise: something is shown, and nothing raised."""
    chance = random.Random(seed)
    details = real_run("two-nodes-one-stopped").run_details.task_details
    for detail in chance.sample(details, 20):
        name = chance.choice(["state", "start_time", "end_time", "child_tasks", "display_name"])
        setattr(detail, name, None)
    for detail in chance.sample(details, 3):
        detail.child_tasks = [PipelineTaskDetailChildTask(pod_name=chance.choice(["x", "a-1", ""]))]
        detail.display_name = chance.choice(["a", "executor(x)", "a.b(3)", "(0)"])
    steps = read_steps(details, training(5))
    assert len(steps) > 1
    assert all(step.line() for step in steps)
