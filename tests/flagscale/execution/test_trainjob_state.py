import json
from typing import Any

import trainjob_nodes
from trainjob_nodes import OTHER, POD_OF_TRAINJOB

from flagscale.execution.trainjob import state as trainjob_state


def pod(index: int, **status: Any) -> dict[str, Any]:
    """A real pod of a TrainJob, which runs unless told otherwise."""
    found: dict[str, Any] = json.loads(POD_OF_TRAINJOB.read_text().replace(OTHER, "j"))
    found["metadata"]["name"] = f"j-node-0-{index}-x"
    found["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = str(index)
    return {**found, "status": found["status"] | status}


def ended(code: int, reason: str, before: bool = False) -> list[dict[str, Any]]:
    """How a container ended, now or before it was started anew."""
    state = {"terminated": {"exitCode": code, "reason": reason}}
    running: dict[str, Any] = {"running": {}}
    states = {"state": running, "lastState": state} if before else {"state": state}
    return [{"name": "node", **states}]


def failed(reason: str) -> dict[str, Any]:
    condition = {"type": "Failed", "status": "True", "reason": reason, "message": "as said"}
    return {"status": {"conditions": [condition]}}


DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}


def test_what_is_waited_for():
    job = trainjob_nodes.Job(
        {"metadata": {"name": "j"}, "spec": {"trainer": {"numNodes": 2}}, "status": {}}
    )
    pods = [trainjob_nodes.pending(job, index) for index in range(2)]
    assert trainjob_state.waiting(job.manifest, pods, 2) == (
        "pod j-node-0-0-x: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    )
    suspended = {"type": "Suspended", "status": "True", "message": "Trainjob is suspended"}
    queued = {**job.manifest, "status": {"conditions": [suspended]}}
    assert "queued by Kueue: Trainjob is suspended" in str(trainjob_state.waiting(queued, [], 2))
    assert trainjob_state.waiting(job.manifest, [pod(0), pod(1)], 2) is None
    assert trainjob_state.first_node([pod(1), pod(0)]) == "j-node-0-0-x"


def test_a_pod_that_died_is_told_of():
    assert trainjob_state.dead_pod([pod(0), pod(1)]) is None
    killed = pod(1, containerStatuses=ended(137, "OOMKilled", before=True))
    assert trainjob_state.dead_pod([pod(0), killed]) == (
        "pod j-node-0-1-x ended: OOMKilled, exit code 137"
    )
    gone = pod(0, phase="Failed", reason="Evicted", message="low on memory")
    assert trainjob_state.dead_pod([gone]) == "pod j-node-0-0-x failed: Evicted: low on memory"
    assert not trainjob_state.all_ended([gone, pod(1)])
    assert trainjob_state.all_ended([gone])


def test_what_another_start_mends_and_what_it_does_not():
    assert not trainjob_state.is_lost([pod(0)])
    assert trainjob_state.lasting({}, [pod(0)]) is None
    assert trainjob_state.is_lost([pod(0), pod(1, conditions=[DISRUPTED])])
    assert not trainjob_state.is_lost([pod(0, conditions=[{**DISRUPTED, "status": "False"}])])
    for code in (137, 143):
        assert trainjob_state.is_lost([pod(0, containerStatuses=ended(code, "Error"))])
    mistake = pod(0, containerStatuses=ended(1, "Error", before=True))
    assert not trainjob_state.is_lost([mistake])
    starved = pod(0, containerStatuses=ended(137, "OOMKilled"))
    assert trainjob_state.lasting({}, [starved]) == "pod j-node-0-0-x ran out of memory (OOMKilled)"
    assert trainjob_state.lasting(failed("DeadlineExceeded"), []) == "DeadlineExceeded: as said"
    assert trainjob_state.lasting(failed("FailedJobs"), [pod(0)]) is None
