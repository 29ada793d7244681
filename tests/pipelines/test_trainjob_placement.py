"""What a training on TrainJobs asks of a cluster: a volume, a small pod, limits, a network."""

from pathlib import Path

import pytest
from compiled_pipeline import RECIPES, compiled

from flagscale.errors import UserError
from flagscale.execution.trainjob.nodes import NodePods
from flagscale.recipe import load_recipe
from pipelines import placement
from pipelines.platform import Platform, Runs, Shared, Trainer, load_platform


def always_trainjobs(platform: Platform) -> Platform:
    return platform.model_copy(update={"trainer": Trainer(min_nodes=1)})


TWO_NODES = ["resources.nodes=2"]
ONE_NODE = "resources.nodes=1 with trainer.min_nodes=1"


@pytest.mark.parametrize(
    ("overrides", "why"), [(TWO_NODES, "resources.nodes=2"), ([], ONE_NODE)], ids=["two", "one"]
)
def test_a_trainjob_needs_a_volume_that_all_pods_mount(overrides: list[str], why: str) -> None:
    recipe = load_recipe(RECIPES["tiny"], overrides)
    platform = load_platform("on-prem-a100")
    assert platform.shared is not None
    assert platform.shared.create is not None
    alone = platform.shared.create.model_copy(update={"access_modes": ("ReadWriteOnce",)})
    missing = {
        "must have ReadWriteMany": platform.shared.model_copy(update={"create": alone}),
        "shared=s3://bucket/x: set shared.claim": Shared(url="s3://bucket/x"),
        "shared=None: set shared.claim or shared.create": None,
    }
    for message, shared in missing.items():
        there = platform.model_copy(update={"shared": shared})
        with pytest.raises(UserError, match=f"^{why} needs a volume that all .*{message}"):
            placement.check(always_trainjobs(there), recipe)
    placement.check(always_trainjobs(platform), recipe)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_trainjob_is_started_by_a_small_pod_that_knows_its_nodes(
    nodes: int, tmp_path: Path
) -> None:
    """Of two nodes by default, of one where the platform always wants it."""
    recipe = load_recipe(RECIPES["qwen3-8b-to-24-layers"], [f"resources.nodes={nodes}"])
    platform = load_platform("gke-h100")
    if nodes == 1:
        alone = compiled(recipe, platform, tmp_path).spec["root"]["dag"]["tasks"]
        assert "distil-student-on-nodes" not in alone
        platform = always_trainjobs(platform)
    found = compiled(recipe, platform, tmp_path)
    tasks = found.spec["root"]["dag"]["tasks"]
    assert "distil-student" not in tasks
    inputs = tasks["distil-student-on-nodes"]["inputs"]["parameters"]
    pods = platform.steps.training
    assert NodePods.model_validate(found.resolve(inputs["pods"])) == NodePods(
        cpu=pods.cpu,
        memory=pods.memory,
        accelerator_type=pods.accelerator_type,
        runtime=platform.trainer.runtime,
        timeout_seconds=pods.timeout_seconds,
        restarts=pods.retries.count,
    )
    assert found.resolve(inputs["nodes"]) == nodes
    assert found.resolve(inputs["accelerator_count"]) == "8"
    own = found.executors["exec-distil-student-on-nodes"]["container"]["resources"]
    assert own["resourceCpuRequest"] == "1"
    evaluated = tasks["evaluate"]["inputs"]["artifacts"]["distilled_student"]["taskOutputArtifact"]
    assert evaluated["producerTask"] == "distil-student-on-nodes"


def test_deadlines_and_time_to_live_are_the_platforms(tmp_path: Path) -> None:
    """The queue's time is the launcher's; the TrainJob's own begins when it is let in."""
    recipe = load_recipe(RECIPES["tiny"], TWO_NODES)
    platform = load_platform("gke-h100")
    trainer = platform.trainer.model_copy(update={"active_deadline_seconds": 86400})
    limits = Runs(active_deadline_seconds=700000, ttl_seconds_after_finished=3600)
    platform = platform.model_copy(update={"trainer": trainer, "runs": limits})
    found = compiled(recipe, platform, tmp_path)
    inputs = found.spec["root"]["dag"]["tasks"]["distil-student-on-nodes"]["inputs"]["parameters"]
    assert NodePods.model_validate(found.resolve(inputs["pods"])).timeout_seconds == 86400
    launcher = found.kubernetes["exec-distil-student-on-nodes"]
    assert launcher["activeDeadlineSeconds"] == str(platform.steps.training.timeout_seconds)
    assert found.platform["platforms"]["kubernetes"]["pipelineConfig"] == {
        "activeDeadlineSeconds": 700000,
        "resourceTtlOnCompletion": 3600,
    }


def test_a_network_is_the_nodes_and_annotations_are_every_pods(tmp_path: Path) -> None:
    platform = load_platform("on-prem-h100-infiniband")
    noted = platform.steps.training.model_copy(update={"annotations": {"example.com/a": "b: c"}})
    steps = platform.steps.model_copy(update={"training": noted})
    platform = platform.model_copy(update={"steps": steps})
    for nodes in (1, 2):
        recipe = load_recipe(RECIPES["qwen3-8b-to-24-layers"], [f"resources.nodes={nodes}"])
        found = compiled(recipe, platform, tmp_path)
        step = "distil-student" + "-on-nodes" * (nodes > 1)
        pod = found.kubernetes[f"exec-{step}"]
        assert pod["podMetadata"]["annotations"] == {"example.com/a": "b: c"}
        container = found.executors[f"exec-{step}"]["container"]
        assert not [one for one in container["env"] if one["name"] == "NCCL_IB_HCA"]
    inputs = found.spec["root"]["dag"]["tasks"][step]["inputs"]["parameters"]
    told = NodePods.model_validate(found.resolve(inputs["pods"]))
    assert told.network == platform.trainer.network
    assert told.network.resources == {"rdma/hca_shared_devices_a": 1}
    assert told.annotations == {"example.com/a": "b: c"}
