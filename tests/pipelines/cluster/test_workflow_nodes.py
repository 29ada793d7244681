"""Argo's names of a run's nodes, found again in what real servers answered."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest

from pipelines.cluster.workflow_nodes import node_id, read_nodes, split_attempt
from tests.pipelines.cluster.argo_nodes import NOT_YET, tasks
from tests.pipelines.cluster.kfp_runs import read_tasks, real_run

REAL = (
    "cached",
    "mistake-not-retried",
    "mistake-retried",
    "stopped-not-retried",
    "succeeded",
    "sweep",
    "two-nodes-one-stopped",
)


def test_the_id_of_a_node_is_argos() -> None:
    name = "distillation-kt952(0).root(0).distil-student(0).executor(0)"
    assert node_id("distillation-kt952", name) == "distillation-kt952-1546906063"
    assert node_id("distillation-kt952", "distillation-kt952") == "distillation-kt952"


@pytest.mark.parametrize("name", REAL)
def test_every_node_of_a_real_run_has_its_name(name: str) -> None:
    details = real_run(name).run_details.task_details
    nodes = {node.name: node for node in read_nodes(details)}
    assert len(nodes) == len([d for d in details if d.display_name])
    for node in nodes.values():
        # A node is within the times of what it is an attempt at, or is in.
        tried, attempt = split_attempt(node.name)
        holder = nodes.get(tried if attempt is not None else node.scope)
        if holder is not None:
            assert holder.start <= node.start
            assert holder.end is None or node.end <= holder.end
        # The attempts are numbered in the order of time, and only the last one can have succeeded.
        before = nodes.get(f"{tried}({attempt - 1})") if attempt else None
        if before is not None:
            assert before.end <= node.start
            assert before.state == "FAILED"


def test_the_attempts_of_a_step_are_found_in_all_that_was_begun_anew() -> None:
    nodes = read_nodes(real_run("mistake-retried").run_details.task_details)
    of_pods = [n for n in nodes if ".executor(" in n.name]
    assert [n.name for n in of_pods] == [
        f"distillation-wgx2x(0).root(0).distil-student({dag}).executor({attempt})"
        for dag in range(3)
        for attempt in range(6)
    ]
    assert of_pods[0].id == "distillation-wgx2x-1838810308"


def test_an_acting_server_lists_nodes_as_the_real_one_does() -> None:
    details = read_tasks(
        tasks(data="CACHED", teacher="SUCCEEDED", student=[["FAILED"] * 3] * 3, last="LEFT OUT")
    )
    shape = {node.name.partition("(")[2]: node.state for node in read_nodes(details)}
    assert len(shape) == len(details)
    assert shape["0).root(0).student(2).executor(1)"] == "FAILED"
    real = read_nodes(real_run("mistake-not-retried").run_details.task_details)
    ours = read_tasks(
        tasks(
            prepare_data="CACHED",
            prepare_teacher="CACHED",
            convert_student="CACHED",
            distil_student="FAILED",
            evaluate="LEFT OUT",
            export_student="LEFT OUT",
        )
    )
    assert {(n.name.partition("(")[2], n.state) for n in read_nodes(ours)} == {
        (n.name.partition("(")[2], n.state) for n in real
    }


def test_attempts_of_variants_that_run_side_by_side_are_told_apart() -> None:
    """By the times and states of what they are attempts at; all are called `executor(0)` or (1)."""
    begin = datetime(2026, 11, 28, 9, tzinfo=UTC)
    pods = {  # of each variant: state, start and end of its executor and of its pods
        0: [("RUNNING", 0, None), ("FAILED", 0, 60), ("RUNNING", 70, None)],
        1: [("SUCCEEDED", 0, 75), ("SUCCEEDED", 0, 65)],
        2: [("FAILED", 0, 95), ("FAILED", 0, 50), ("FAILED", 60, 90)],
    }
    holders = {"w": ["w.loop(0:0)", "w.loop(1:1)", "w.loop(2:2)"]}
    times = dict.fromkeys(["w", *holders["w"]], ("RUNNING", 0, None))
    for variant, (executor, *attempts) in pods.items():
        name = f"w.loop({variant}:{variant}).executor"
        holders[f"w.loop({variant}:{variant})"] = [name]
        holders[name] = [f"{name}({number})" for number in range(len(attempts))]
        times |= {name: executor} | dict(zip(holders[name], attempts, strict=True))
    entries = [
        {
            "display_name": name.rpartition(".")[2],
            "state": state,
            "start_time": (begin + timedelta(seconds=start)).isoformat(),
            "end_time": NOT_YET if end is None else (begin + timedelta(seconds=end)).isoformat(),
            "child_tasks": [{"pod_name": node_id("w", child)} for child in holders.get(name, [])],
        }
        for name, (state, start, end) in times.items()
    ]
    for order in itertools.islice(itertools.permutations(entries), 0, 10**6, 49_999):
        found = read_nodes(read_tasks(list(order)))
        assert {node.name: node.state for node in found} == {n: t[0] for n, t in times.items()}
        starts = {node.name: (node.start - begin).total_seconds() for node in found}
        assert starts == {name: start for name, (_, start, _) in times.items()}


def test_nodes_of_servers_that_name_no_children_cannot_be_told() -> None:
    details = real_run("succeeded").run_details.task_details
    for detail in details:
        detail.child_tasks = None
    assert read_nodes(details) == []
    assert read_nodes([]) == []
