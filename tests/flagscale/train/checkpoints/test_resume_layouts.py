"""Interrupted on one parallel layout, resumed on another: the losses of an unbroken training."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from resume_worker import STEPS, Task, run

RELATIVE = 1e-5  # the bound for fp32
WORKER = Path(__file__).with_name("resume_worker.py")
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
EXPERT = {"expert_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
# Communication with the backward and the forward pass, in many small buckets with padded ends.
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 1000}
OVERLAPPED = "DP2, sharded, overlapped"
LAYOUTS = {
    "one": (1, {}),
    "TP2": (2, TENSOR),
    "PP2": (2, PIPELINE),
    "DP2": (2, {}),
    "EP2": (2, EXPERT),
    "one, sharded": (1, SHARDED),
    "TP2, sharded": (2, TENSOR | SHARDED),
    "DP2, sharded": (2, SHARDED),
    OVERLAPPED: (2, SHARDED),
    "EP2, sharded, overlapped": (2, EXPERT | SHARDED),
    "TP2 x DP2, sharded": (4, TENSOR | SHARDED),
    "EP2, sharded": (2, EXPERT | SHARDED),
    "TP2 x PP2": (4, TENSOR | PIPELINE),
}
RESUMES = [
    ("distillation", "one", "TP2"),
    ("distillation", "one", "PP2"),
    ("distillation", "one", "DP2"),
    ("distillation", "TP2", "one"),
    ("distillation", "PP2", "one"),
    ("distillation", "DP2", "one"),
    ("distillation", "TP2", "PP2"),
    ("distillation", "TP2 x PP2", "one"),
    ("distillation", "one", "TP2 x PP2"),
    ("experts", "one", "EP2"),
    ("experts", "EP2", "one"),
    # The distributed optimiser, whose state is sharded over data-parallel ranks.
    ("distillation", "DP2, sharded", "one, sharded"),
    ("distillation", "DP2, sharded", "TP2, sharded"),
    ("experts", "DP2, sharded", "EP2, sharded"),
    ("experts", "EP2, sharded", "one"),
    ("distillation", "TP2, sharded", "PP2"),
    ("distillation", OVERLAPPED, OVERLAPPED),
    ("distillation", OVERLAPPED, "TP2 x DP2, sharded"),
    ("distillation", "one", OVERLAPPED),
    ("experts", "EP2, sharded, overlapped", "DP2, sharded"),
]


def whole(kind: str) -> Task:
    return Task(f"{kind}, whole", kind, 1)


def part(kind: str, first: str) -> Task:
    """The training until it is interrupted, after a step that its name decides."""
    processes, parallelism = LAYOUTS[first]
    name = f"{kind}, {first}"
    stop_after = random.Random(name).randint(1, STEPS - 1)
    return Task(
        name,
        kind,
        processes,
        parallelism,
        stop_after,
        async_save=stop_after % 2 == 1,
        training=more(first),
    )


def more(layout: str) -> dict[str, Any]:
    return OVERLAP if layout.endswith("overlapped") else {}


def rest(kind: str, first: str, second: str) -> Task:
    processes, parallelism = LAYOUTS[second]
    name, before = f"{kind}, {second} after {first}", part(kind, first).name
    return Task(name, kind, processes, parallelism, resume=before, training=more(second))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, torchrun, teacher, dataset):
    """What every task left: one process first and last, one torchrun a number of processes."""
    folder = tmp_path_factory.mktemp("resume")
    inputs = {"teacher": str(teacher), "dataset": str(dataset)}
    parts = list({part(kind, first).name: part(kind, first) for kind, first, _ in RESUMES}.values())
    rests = [rest(*case) for case in RESUMES]
    tasks = [asdict(task) for task in (*parts, *rests)]
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks, "inputs": inputs}))
    kinds = dict.fromkeys(kind for kind, _, _ in RESUMES)
    for task in (*(whole(kind) for kind in kinds), *(one for one in parts if one.processes == 1)):
        run(task, folder, inputs)
    for processes in (2, 4):
        torchrun(processes, WORKER, folder)
    for task in (one for one in rests if one.processes == 1):
        run(task, folder, inputs)
    return folder


def records(folder: Path, task: Task) -> dict[str, list[dict[str, float]]]:
    """Everything but the clock's part."""
    result = json.loads((folder / task.name / "result.json").read_text())
    return {
        kind: [
            {name: value for name, value in record.items() if name != "tokens per second"}
            for record in result[kind]
        ]
        for kind in ("training", "validation")
    }


@pytest.mark.parametrize(("kind", "first", "second"), RESUMES)
def test_resumed_on_another_layout(folder, kind, first, second):
    expected, found = records(folder, whole(kind)), records(folder, rest(kind, first, second))
    result = json.loads((folder / rest(kind, first, second).name / "result.json").read_text())
    assert result["first"] == part(kind, first).stop_after + 1
    assert [record["step"] for record in found["training"]] == list(range(1, STEPS + 1))
    for name in expected:
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert ours == pytest.approx(theirs, rel=RELATIVE)


def test_all_ranks_save_when_the_first_ones_clock_says_so(folder):
    """A minute is three steps there."""
    stops = {part(kind, first).name: part(kind, first).stop_after for kind, first, _ in RESUMES}
    assert any(stop > 3 for stop in stops.values())
    for name, stop in stops.items():
        saved = json.loads((folder / name / "result.json").read_text())["saved"]
        assert saved == sorted({min(3, stop), stop}), name


def test_lost_optimiser_state_would_be_seen(folder, teacher, dataset):
    """The losses above depend on Adam's moments and step."""

    def forget(trainer):
        for state in trainer.optimizer.optimizer.state.values():
            state["exp_avg"].zero_()

    before = part("distillation", "one")
    task = Task("forgetful", "distillation", 1, resume=before.name)
    run(task, folder, {"teacher": str(teacher), "dataset": str(dataset)}, spoil=forget)
    expected, found = records(folder, whole("distillation")), records(folder, task)
    last, right = found["training"][-1]["lm loss"], expected["training"][-1]["lm loss"]
    assert abs(last / right - 1) > 10 * RELATIVE


def test_saved_in_the_background_is_what_is_saved_at_once(folder, teacher, dataset):
    inputs, losses = {"teacher": str(teacher), "dataset": str(dataset)}, []
    for name, async_save in (("at once", False), ("in the background", True)):
        task = Task(name, "experts", 1, stop_after=3, async_save=async_save)
        run(task, folder, inputs)
        rest_of_it = Task(f"{name}, rest", "experts", 1, resume=name, async_save=async_save)
        run(rest_of_it, folder, inputs)
        losses.append(records(folder, rest_of_it))
    assert losses[0] == losses[1] == records(folder, whole("experts"))
