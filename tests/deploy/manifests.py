"""Reads the manifests of deploy/ as `kubectl apply -k` would."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
DEPLOY = Path(__file__).parents[2] / "deploy"
BUILDS = ("base", "overlays/gke", "overlays/kubeflow-profile")
WORKLOADS = ("Deployment", "StatefulSet")


def documents(path: Path) -> list[Manifest]:
    return [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d]


def kustomization(folder: Path) -> Manifest:
    [found] = documents(folder / "kustomization.yaml")
    return found


def build(folder: str) -> list[Manifest]:
    """What `kubectl apply -k` would send; without a kubectl, the same less the patches."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return list(_unpatched(DEPLOY / folder))
    command = [kubectl, "kustomize", str(DEPLOY / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [d for d in yaml.safe_load_all(done.stdout) if d]


def _unpatched(folder: Path) -> Iterator[Manifest]:
    settings = kustomization(folder)
    for name in [*settings.get("resources", []), *settings.get("components", [])]:
        path = (folder / name).resolve()
        yield from _unpatched(path) if path.is_dir() else documents(path)
    for made in settings.get("configMapGenerator", []):
        data = dict(literal.split("=", 1) for literal in made["literals"])
        yield {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": made["name"]},
            "data": data,
        }


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    """Manifests by name."""
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in kinds}


def pod(workload: Manifest) -> Manifest:
    found: Manifest = workload["spec"]["template"]
    return found


def containers(workload: Manifest) -> list[Manifest]:
    spec = pod(workload)["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def secret_shapes() -> dict[str, set[str]]:
    """Keys of each Secret by its name, from secrets.example.yaml."""
    found = of_kind(documents(DEPLOY / "secrets.example.yaml"), "Secret")
    return {name: set(secret["stringData"]) for name, secret in found.items()}


def environment(
    container: Manifest, secrets: dict[str, dict[str, str]], config: dict[str, str]
) -> dict[str, str]:
    """The variables that a container would see.

    Args:
        container: of a pod.
        secrets: values by name and key.
        config: values of the ConfigMap.
    """
    found = {}
    for variable in container["env"]:
        source = variable.get("valueFrom", {})
        if "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            value = secrets.get(reference["name"], {}).get(reference["key"])
            if value is None:
                assert reference.get("optional"), f"the pod would not start without {reference}"
                continue
        elif "configMapKeyRef" in source:
            value = config[source["configMapKeyRef"]["key"]]
        else:
            value = variable["value"]
        found[variable["name"]] = value
    return found
