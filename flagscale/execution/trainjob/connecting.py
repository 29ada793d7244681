"""What is looked up when the launcher of a TrainJob connects, and what its runtime's pods are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def namespace(kubeconfig: str | None) -> str:
    """This pod's, or the one of the `KUBECONFIG`."""
    if kubeconfig is None:
        return _NAMESPACE.read_text(encoding="utf-8").strip()
    from kubernetes import config

    _, context = config.list_kube_config_contexts(config_file=kubeconfig)
    return str(context["context"].get("namespace", "default"))


@contextmanager
def version_unread() -> Iterator[None]:
    """Without the page that the SDK prints where it may not read which Trainer there is.

    `Cluster.check` finds out what is missing, by what is needed.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "control-plane version info is not available" not in record.getMessage()

    sdk = logging.getLogger("kubeflow.trainer.backends.kubernetes.backend")
    sdk.addFilter(is_other)
    try:
        yield
    finally:
        sdk.removeFilter(is_other)


def is_on_host_network(runtime: dict[str, Any]) -> bool:
    """Whether a (Cluster)TrainingRuntime puts its training's pods on the nodes' own network."""
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pods = [job["template"]["spec"]["template"]["spec"] for job in jobs if job["name"] == "node"]
    return bool(pods) and all(pod.get("hostNetwork", False) for pod in pods)
