import trainjob_nodes

from flagscale.ranks import trainjob_state


def test_what_is_waited_for(tmp_path):
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
    for pod in pods:
        pod["status"] = {"phase": "Running"}
    assert trainjob_state.waiting(job.manifest, pods, 2) is None
    assert trainjob_state.dead_pod(pods) is None
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pods[1]["status"]["containerStatuses"] = [
        {"name": "node", "state": {"running": {}}, "lastState": ended}
    ]
    assert trainjob_state.dead_pod(pods) == "pod j-node-0-1-x ended: OOMKilled, exit code 137"
    pods[0]["status"] = {"phase": "Failed", "reason": "Evicted", "message": "low on memory"}
    assert trainjob_state.dead_pod(pods) == "pod j-node-0-0-x failed: Evicted: low on memory"
    assert not trainjob_state.all_ended(pods)
    assert trainjob_state.all_ended(pods[:1])
