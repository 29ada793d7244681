"""deploy/ is what Kubernetes takes, and its parts and the platform files fit together."""

import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1ClusterTrainingRuntime
from manifests import (
    BUILDS,
    DEPLOY,
    WORKLOADS,
    Manifest,
    build,
    containers,
    documents,
    kustomization,
    of_kind,
    pod,
    secret_shapes,
)

from components.image import VERSION
from flagscale.execution.trainjob.connecting import is_on_host_network
from flagscale.execution.trainjob.rights import RULES
from flagscale.recipe import load_recipe
from pipelines.compiling import compile_recipe
from pipelines.platform import FOLDER, Platform, load_platform

KUBERNETES = ("1.31", kubernetes_validate.latest_version())  # the oldest that Trainer takes
PLATFORMS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="patches are applied by kubectl, which is not here"
)


@pytest.fixture(scope="module", params=BUILDS)
def built(request: pytest.FixtureRequest) -> list[Manifest]:
    return build(request.param)


def test_every_file_belongs_to_a_kustomization() -> None:
    used = set()
    for path in DEPLOY.rglob("kustomization.yaml"):
        used.add(path)
        settings = kustomization(path.parent)
        patches = [p["path"] for p in settings.get("patches", []) if "path" in p]
        for name in [*settings.get("resources", []), *settings.get("components", []), *patches]:
            named = (path.parent / name).resolve()
            used.add(named / "kustomization.yaml" if named.is_dir() else named)
    assert {path for path in used if not path.is_file()} == set()
    names = ("host-network.yaml", "secrets.example.yaml", "volume-owner.yaml")
    by_hand = {DEPLOY / name for name in names}
    assert set(DEPLOY.rglob("*.yaml")) - used == by_hand


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_them(built: list[Manifest], version: str) -> None:
    by_hand = ("secrets.example.yaml", "volume-owner.yaml")
    for manifest in [*built, *(d for name in by_hand for d in documents(DEPLOY / name))]:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_trainer_takes_the_runtime_on_the_nodes_network() -> None:
    (runtime,) = documents(DEPLOY / "host-network.yaml")
    known = TrainerV1alpha1ClusterTrainingRuntime.from_dict(runtime)
    assert known is not None
    assert known.to_dict() == runtime  # it drops what it does not know
    assert is_on_host_network(runtime)
    spec = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **spec}
    for version in KUBERNETES:
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_schemas_refuse_what_is_wrong(built: list[Manifest]) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(of_kind(built, "Deployment")["mlflow"]))
    pod(wrong)["spec"]["securityContext"]["runAsNonroot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES[0], strict=True)


def test_pods_keep_to_the_restricted_standard(built: list[Manifest]) -> None:
    workloads = of_kind(built, *WORKLOADS)
    assert workloads
    for workload in workloads.values():
        spec = pod(workload)["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(workload):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_mounts_are_volumes_and_every_writable_folder_is_one(built: list[Manifest]) -> None:
    for workload in of_kind(built, *WORKLOADS).values():
        spec = pod(workload)["spec"]
        claims = workload["spec"].get("volumeClaimTemplates", [])
        volumes = {v["name"] for v in spec["volumes"]} | {c["metadata"]["name"] for c in claims}
        mounts = [m for c in containers(workload) for m in c["volumeMounts"]]
        assert {m["name"] for m in mounts} == volumes
        assert "/tmp" in {m["mountPath"] for m in mounts}


def test_images_are_pinned_and_ours_is_this_release(built: list[Manifest]) -> None:
    images = {c["image"] for w in of_kind(built, *WORKLOADS).values() for c in containers(w)}
    for image in images:
        tag = image.rpartition(":")[2]
        assert re.search(r"\d+\.\d+", tag), image
        if image.startswith("flagscale"):
            assert image == f"flagscale-distillation:{VERSION}-mlflow"


def test_root_does_nothing_but_give_the_volume_to_the_steps() -> None:
    [job] = documents(DEPLOY / "volume-owner.yaml")
    [volume] = pod(job)["spec"]["volumes"]
    claims = of_kind(documents(DEPLOY / "base/volume.yaml"), "PersistentVolumeClaim")
    assert volume["persistentVolumeClaim"]["claimName"] in claims
    [container] = containers(job)
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    user, folder = Platform().run_as_user, container["volumeMounts"][0]["mountPath"]
    assert container["command"] == ["chown", f"{user}:{user}", folder]


def _references(value: Any, name: str) -> list[Manifest]:
    """Every value of this name, at any depth."""
    if isinstance(value, dict):
        found = [value[name]] if name in value else []
        return found + [r for v in value.values() for r in _references(v, name)]
    if isinstance(value, list):
        return [r for v in value for r in _references(v, name)]
    return []


def test_secrets_are_only_referred_to_and_have_the_documented_shape(built: list[Manifest]) -> None:
    assert not of_kind(built, "Secret")
    shapes = secret_shapes()
    for reference in _references(built, "secretKeyRef"):
        assert reference["key"] in shapes[reference["name"]], reference
    for variable in [v for env in _references(built, "env") for v in env]:
        if re.search("PASSWORD|SECRET|KEY|TOKEN", variable["name"]):
            assert "value" not in variable, variable["name"]
    for argument in [a for args in _references(built, "args") for a in args]:
        assert not re.search(r"://[^/@\s]*:[^/@\s]*@", argument), "a password in a URL"


def test_the_example_holds_no_values() -> None:
    for secret in documents(DEPLOY / "secrets.example.yaml"):
        assert "data" not in secret
        assert set(secret["stringData"].values()) <= {"", "{}"}


def test_config_maps_have_the_keys_that_pods_ask_for(built: list[Manifest]) -> None:
    maps = {name: set(m["data"]) for name, m in of_kind(built, "ConfigMap").items()}
    references = _references(built, "configMapKeyRef")
    assert references
    for reference in references:
        assert reference["key"] in maps[reference["name"]]


def test_services_policies_and_accounts_find_their_pods(built: list[Manifest]) -> None:
    workloads = of_kind(built, *WORKLOADS)
    ports = {
        name: {p["name"]: p["containerPort"] for c in containers(w) for p in c.get("ports", [])}
        for name, w in workloads.items()
    }

    def selected(selector: dict[str, str]) -> list[str]:
        labels = {name: pod(w)["metadata"]["labels"] for name, w in workloads.items()}
        return [name for name, found in labels.items() if selector.items() <= found.items()]

    for name, service in of_kind(built, "Service").items():
        assert selected(service["spec"]["selector"]) == [name]
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= set(ports[name])
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[name][port["targetPort"]]
    policies = of_kind(built, "NetworkPolicy")
    assert set(policies) == set(workloads), "a server without a policy is open to the cluster"
    for name, policy in policies.items():
        assert selected(policy["spec"]["podSelector"]["matchLabels"]) == [name]
        for rule in policy["spec"]["ingress"]:
            assert {p["port"] for p in rule["ports"]} <= set(ports[name])
            for peer in rule["from"]:
                assert set(peer) == {"podSelector"}, "nobody outside the namespace"
                assert selected(peer["podSelector"].get("matchLabels", {}))
    for name, workload in workloads.items():
        assert selected(workload["spec"]["selector"]["matchLabels"]) == [name]
        for container in containers(workload):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                action = container.get(probe, {})
                port = (action.get("httpGet") or action.get("tcpSocket") or {}).get("port")
                assert port is None or port in ports[name]
        account = pod(workload)["spec"].get("serviceAccountName")
        assert account is None or account in of_kind(built, "ServiceAccount")


def test_the_server_asks_for_the_database_that_is_there(built: list[Manifest]) -> None:
    mlflow = containers(of_kind(built, "Deployment")["mlflow"])[-1]
    database = containers(of_kind(built, "StatefulSet")["mlflow-postgres"])[0]
    settings = {v["name"]: v.get("value") for v in database["env"]}
    user, name = settings["POSTGRES_USER"], settings["POSTGRES_DB"]
    port = of_kind(built, "Service")["mlflow-postgres"]["spec"]["ports"][0]["port"]
    uri = f"--backend-store-uri=postgresql+psycopg2://{user}@mlflow-postgres:{port}/{name}"
    assert uri in mlflow["args"]
    secrets = {
        variable["name"]: variable["valueFrom"]["secretKeyRef"]
        for variable in [*mlflow["env"], *database["env"]]
        if "secretKeyRef" in variable.get("valueFrom", {})
    }
    assert secrets["PGPASSWORD"] == secrets["POSTGRES_PASSWORD"]


def test_the_launcher_may_do_what_it_does_and_no_more(built: list[Manifest]) -> None:
    def rights(role: Manifest) -> set[tuple[str, str, str]]:
        return {
            (group, resource, verb)
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }

    asked = {(rule.group, rule.resource, verb) for rule in RULES for verb in rule.verbs}
    everywhere = {right for right in asked if right[1].startswith("cluster")}
    [role] = of_kind(built, "Role").values()
    assert rights(role) == asked - everywhere
    [cluster] = of_kind(built, "ClusterRole").values()
    assert rights(cluster) == everywhere
    for binding in of_kind(built, "RoleBinding", "ClusterRoleBinding").values():
        reference = binding["roleRef"]
        assert reference["name"] in of_kind(built, reference["kind"])


@pytest.mark.parametrize("name", PLATFORMS)
def test_platforms_ask_for_what_is_deployed(name: str, tmp_path: Path) -> None:
    """Secrets, keys and claims of the compiled pipeline, not of the platform file alone."""
    recipe = load_recipe(Path("recipes/tiny.yaml"))
    compiled = compile_recipe(recipe, load_platform(name), tmp_path / "pipeline.yaml")
    pipeline, platform = documents(compiled)
    defaults = {
        name: parameter.get("defaultValue")
        for name, parameter in pipeline["root"]["inputDefinitions"]["parameters"].items()
    }

    def named(reference: Any) -> str:
        parameter = reference.get("componentInputParameter", "").removeprefix("pipelinechannel--")
        return str(reference.get("runtimeValue", {}).get("constant") or defaults[parameter])

    shapes = secret_shapes()
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    asked = [s for e in executors for s in e.get("secretAsEnv", [])]
    assert asked
    for secret in asked:
        name_of_secret = secret.get("secretName") or named(secret["secretNameParameter"])
        for pair in secret["keyToEnv"]:
            assert pair["secretKey"] in shapes[name_of_secret]
    pulls = [s for e in executors for s in e.get("imagePullSecret", [])]
    assert {s.get("secretName") or named(s["secretNameParameter"]) for s in pulls} <= set(shapes)
    shared = load_platform(name).shared
    if shared is not None and shared.claim is not None:
        claim = of_kind(documents(DEPLOY / "base/volume.yaml"), "PersistentVolumeClaim")
        assert claim[shared.claim]["spec"]["accessModes"] == ["ReadWriteMany"]


@needs_kubectl
def test_a_profile_has_everything_in_its_own_namespace() -> None:
    built = build("overlays/kubeflow-profile")
    for manifest in built:
        if not manifest["kind"].startswith("ClusterRole"):
            assert manifest["metadata"]["namespace"] == "my-profile"
    for binding in of_kind(built, "RoleBinding", "ClusterRoleBinding").values():
        [subject] = binding["subjects"]
        assert subject["name"] == "default-editor"
        assert subject["namespace"] == "my-profile"
    [cluster] = of_kind(built, "ClusterRoleBinding")
    assert cluster.endswith("-my-profile"), "two profiles would take it from one another"
    for workload in of_kind(built, *WORKLOADS).values():
        assert pod(workload)["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"


@needs_kubectl
def test_gke_has_a_class_that_several_nodes_mount_and_the_bucket_comes_first() -> None:
    built = build("overlays/gke")
    volume = of_kind(built, "PersistentVolumeClaim")["flagscale-shared"]
    assert volume["spec"]["storageClassName"] == "standard-rwx"
    first, server = containers(of_kind(built, "Deployment")["mlflow"])
    assert (first["name"], server["name"]) == ("create-bucket", "mlflow")
    assert first["image"] == server["image"]
    for binding in of_kind(built, "RoleBinding", "ClusterRoleBinding").values():
        assert [s["name"] for s in binding["subjects"]] == ["pipeline-runner"]
