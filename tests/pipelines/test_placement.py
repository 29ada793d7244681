"""What the compiled YAML asks of a cluster, read back from it, against the platform files."""

import re
from pathlib import Path
from typing import Any

import pytest
from compiled_pipeline import RECIPES, Compiled, compiled
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec import pipeline_spec_pb2

from components.image import VERSION
from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from pipelines import placement, where
from pipelines.compiling import compile_recipe
from pipelines.platform import FOLDER, Platform, load_platform
from pipelines.pods import Pods

PLATFORMS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALL = ("check-recipe", "record-run", "record-many", "pick-candidate")
KINDS = {
    **dict.fromkeys(("prepare-data", "leaderboard", "rank-candidates", *SMALL), "data"),
    "distil-student": "training",
}


def step_of(task: str) -> str:
    """A search has some steps several times, which KFP numbers; a launcher's name has its own."""
    return re.sub(r"-\d+$", "", task.removeprefix("exec-"))


def fits(recipe: Recipe, platform: Platform) -> bool:
    """Whether the platform has what the recipe needs."""
    try:
        placement.check(platform, recipe)
    except UserError:
        return False
    return True


PAIRS = [
    (recipe, platform)
    for recipe in RECIPES
    for platform in PLATFORMS
    if fits(load_recipe(RECIPES[recipe]), load_platform(platform))
]


@pytest.fixture(params=PAIRS, ids="-on-".join, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Platform, Compiled]:
    """What is compiled takes seconds: once for all tests, which only read."""
    recipe, platform = load_recipe(RECIPES[request.param[0]]), load_platform(request.param[1])
    return recipe, platform, compiled(recipe, platform, tmp_path_factory.mktemp("pair"))


def test_every_platform_holds_the_default_recipe_and_every_recipe_has_a_platform() -> None:
    assert {platform for recipe, platform in PAIRS if recipe == "tiny"} == set(PLATFORMS)
    assert {recipe for recipe, _ in PAIRS} == set(RECIPES)


def test_both_documents_parse_strictly(pair: tuple[Recipe, Platform, Compiled]) -> None:
    _, _, found = pair
    parsed = json_format.ParseDict(found.spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(
        json_format.MessageToDict(parsed.deployment_spec),
        pipeline_spec_pb2.PipelineDeploymentConfig(),
    )
    assert set(found.kubernetes) <= set(found.executors)
    for executor in found.kubernetes.values():
        json_format.ParseDict(executor, KubernetesExecutorConfig())


def test_each_step_gets_what_the_platform_says(pair: tuple[Recipe, Platform, Compiled]) -> None:
    recipe, platform, found = pair
    steps = {k for k in found.executors if "createpvc" not in k}
    assert {"exec-prepare-data", "exec-prepare-teacher", "exec-evaluate"} <= steps
    for name in steps:
        step = step_of(name)
        kind = KINDS.get(step.removesuffix("-on-nodes"), "models")
        pods: Pods = getattr(platform.steps, kind)
        container = found.executors[name]["container"]
        check_container(found, container, step, pods, recipe)
        check_pod(found, found.kubernetes[name], container, platform, pods)


def check_container(
    found: Compiled, container: dict[str, Any], step: str, pods: Pods, recipe: Recipe
) -> None:
    resources = container["resources"]
    launcher = step.endswith("-on-nodes")
    if step in SMALL:  # whatever the data wants
        assert (resources["resourceCpuRequest"], resources["resourceMemoryLimit"]) == ("1", "4Gi")
    elif not launcher:
        assert resources["resourceCpuRequest"] == pods.cpu
        assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"] == pods.memory
    image = found.resolve(container["image"])
    if KINDS.get(step) == "data" or launcher:
        assert "accelerator" not in resources
    else:
        asked = resources["accelerator"]
        count = pods.accelerator_count
        if step == "distil-student" and recipe.resources.accelerator_count:
            count = min(count, recipe.resources.accelerator_count)
        assert asked["resourceType"] == pods.accelerator_type
        # KFP's driver reads text only: an integer would be taken for nothing, silently.
        assert found.resolve(asked["resourceCount"]) == str(count)
        assert ("gpu" in image) == (count > 0)
    assert ("gpu" in image) == (pods.accelerator_count > 0)


def check_pod(
    found: Compiled,
    pod: dict[str, Any],
    container: dict[str, Any],
    platform: Platform,
    pods: Pods,
) -> None:
    assert found.resolve(pod["nodeSelector"]["nodeSelectorJson"]) == pods.node_selector
    (toleration,) = pod["tolerations"]
    assert found.resolve(toleration["tolerationJson"]) == [
        t.model_dump(exclude_none=True) for t in pods.tolerations
    ]
    assert pod.get("podMetadata", {}).get("labels", {}) == pods.all_labels
    assert pod.get("podMetadata", {}).get("annotations", {}) == pods.annotations
    mounts = {mount["mountPath"]: mount for mount in pod["emptyDirMounts"]}
    assert "/tmp" in mounts
    shm = mounts.get("/dev/shm", {})
    assert shm.get("sizeLimit") == pods.shared_memory
    assert shm.get("medium") == ("Memory" if pods.shared_memory else None)
    timeout = pod.get("activeDeadlineSeconds")
    assert timeout == (str(pods.timeout_seconds) if pods.timeout_seconds else None)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert int(pod["securityContext"]["runAsUser"]) == platform.run_as_user != 0
    assert pod["imagePullPolicy"] == platform.images.pull_policy
    pulls = [found.resolve(s["secretNameParameter"]) for s in pod.get("imagePullSecret", [])]
    assert pulls == list(platform.images.pull_secrets)
    check_secrets(found, pod, container, platform)
    if container is found.executors["exec-check-recipe"]["container"]:
        assert "pvcMount" not in pod  # its own may not be there yet
    else:
        check_volume(found, pod, platform)


def check_secrets(
    found: Compiled, pod: dict[str, Any], container: dict[str, Any], platform: Platform
) -> None:
    asked = {
        (found.resolve(secret["secretNameParameter"]), pair["secretKey"], pair["envVar"]): secret[
            "optional"
        ]
        for secret in pod.get("secretAsEnv", [])
        for pair in secret["keyToEnv"]
    }
    wanted = {
        (secret.name, key, variable): secret.optional
        for secret in platform.secrets
        for key, variable in secret.env.items()
    }
    if platform.mlflow.secret:
        name = platform.mlflow.secret
        wanted[name, "tracking-uri", "FLAGSCALE_MLFLOW_TRACKING_URI"] = False
        wanted[name, "username", "FLAGSCALE_MLFLOW_TRACKING_USERNAME"] = True
        wanted[name, "password", "FLAGSCALE_MLFLOW_TRACKING_PASSWORD"] = True
    assert asked == wanted
    # KFP's plugin sets these to values: Kubernetes refuses one that is a secret's as well.
    plain = {e["name"] for e in container["env"]}
    assert not {n for n in {v for _, _, v in asked} | plain if n.startswith("MLFLOW_")}
    told = {e["name"]: e["value"] for e in container["env"]}.get("FLAGSCALE_SECRET_VARIABLES")
    names = [name for secret in platform.secrets for name in secret.env.values()]
    assert (told.split(",") if told else []) == names


def check_volume(found: Compiled, pod: dict[str, Any], platform: Platform) -> None:
    mounts = pod.get("pvcMount", [])
    new = found.spec["root"]["dag"]["tasks"].get("createpvc")
    assert new is None or new["dependentTasks"] == ["check-recipe"]  # a mistake leaves no volume
    if platform.shared is None or platform.shared.url:
        assert mounts == []
        return
    (mount,) = mounts
    assert mount["mountPath"] == platform.shared.mount_path
    if platform.shared.claim:
        assert found.resolve(mount["pvcNameParameter"]) == platform.shared.claim
    else:
        made = {"outputParameterKey": "name", "producerTask": "createpvc"}
        in_a_loop = {"componentInputParameter": "pipelinechannel--createpvc-name"}
        assert mount["pvcNameParameter"] in ({"taskOutputParameter": made}, in_a_loop)


def test_retries_are_the_platforms(pair: tuple[Recipe, Platform, Compiled]) -> None:
    _, platform, found = pair
    dags = [found.spec["root"], *found.spec["components"].values()]
    tasks = {n: t for dag in dags for n, t in dag.get("dag", {}).get("tasks", {}).items()}
    checked = 0
    for name, task in tasks.items():
        step = step_of(name).removesuffix("-on-nodes")
        if name == "createpvc" or f"exec-{name}" not in found.executors:
            continue
        retries = getattr(platform.steps, KINDS.get(step, "models")).retries
        policy = task["retryPolicy"]
        assert policy["maxRetryCount"] == retries.count
        assert policy["backoffDuration"] == retries.backoff
        assert policy["backoffFactor"] == retries.factor
        assert policy["backoffMaxDuration"] == retries.max_duration
        checked += 1
    assert checked >= 6


def test_another_default_changes_nothing_else(tmp_path: Path) -> None:
    platform = load_platform("gke-h100")
    recipe = load_recipe(RECIPES["tiny"])
    before = compile_recipe(recipe, platform, tmp_path / "a.yaml").read_text().splitlines()
    pods = platform.steps.models.model_copy(update={"node_selector": {"pool": "other"}})
    steps = platform.steps.model_copy(update={"models": pods})
    other = platform.model_copy(update={"steps": steps})
    after = compile_recipe(recipe, other, tmp_path / "b.yaml").read_text().splitlines()
    changed = [(a.strip(), b.strip()) for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [("cloud.google.com/gke-accelerator: nvidia-h100-80gb", "pool: other")]

    warmer = load_recipe(RECIPES["tiny"], ["distillation.temperature=3"])
    after = compile_recipe(warmer, platform, tmp_path / "c.yaml").read_text().splitlines()
    changed = [(a.strip(), b.strip()) for a, b in zip(before, after, strict=True) if a != b]
    # As the section's default, and as what the check knows it by.
    assert changed == [("temperature: 1.0", "temperature: 3.0")] * 2


@pytest.mark.parametrize(
    ("recipe", "overrides", "platform", "message"),
    [
        ("smollm2-135m-to-22-layers", ["resources.accelerator_count=8"], "gke-h100", "8 data-par"),
        ("tiny", ["resources.nodes=2"], "cpu-only", "resources.nodes=2 needs a volume"),
        (
            "tiny",
            ["resources.accelerator_count=9"],
            "gke-h100",
            "count=9, but a training pod has 8",
        ),
        (
            "tiny",
            ["training.parallelism.processes=2"],
            "gke-h100",
            "processes=2 with accelerator_count=1",
        ),
    ],
)
def test_a_platform_that_cannot_hold_it_is_refused(
    recipe: str, overrides: list[str], platform: str, message: str, tmp_path: Path
) -> None:
    asked = load_recipe(RECIPES[recipe], overrides)
    with pytest.raises(UserError, match=message):
        compile_recipe(asked, load_platform(platform), tmp_path / "p.yaml")


IMAGE_VARIABLES = ("FLAGSCALE_REGISTRY", "FLAGSCALE_CPU_IMAGE", "FLAGSCALE_GPU_IMAGE")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLAGSCALE_CPU_IMAGE", "a b"),
        ("FLAGSCALE_REGISTRY", "https://me:planted@registry.example.com"),
        ("FLAGSCALE_REGISTRY", "Registry.example.com/ML"),
        ("FLAGSCALE_REGISTRY", "registry.example.com/a b"),
    ],
)
def test_a_wrong_image_of_the_environment_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in IMAGE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        UserError, match=f"of FLAGSCALE_CPU_IMAGE or .*{IMAGE_VARIABLES[0]}"
    ) as error:
        where.parameters(load_platform("cpu-only"), load_recipe(RECIPES["tiny"]))
    assert "planted" not in str(error.value)


def test_an_empty_variable_names_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in IMAGE_VARIABLES:
        monkeypatch.setenv(name, "")
    found = where.parameters(load_platform("gke-h100"), load_recipe(RECIPES["tiny"]))
    images = {p.default for p in found if p.name.endswith("_image")}
    assert images == {f"flagscale-distillation:{VERSION}-{kind}" for kind in ("cpu", "gpu")}
