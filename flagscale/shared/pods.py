"""The pod of a KFP step, as a lease names it: who comes after it, and whether it is gone."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale import variables
from flagscale.artifacts import digest

if TYPE_CHECKING:
    from kubernetes.client import CoreV1Api

logger = logging.getLogger(__name__)

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT_SECONDS = 10
_ENDED = ("Failed", "Succeeded")


@dataclass(frozen=True)
class Pod:
    """A pod of a step.

    Attributes:
        name: in its namespace; KFP gives it again when a failed run is retried in the UI.
        uid: never given again.
        run: id of the KFP run.
        attempt: of the step, from 0; a retry of what the step is part of begins anew.
        namespace: empty if it is not known.
        cluster: what tells its cluster from another; empty if it is not known.
    """

    name: str
    uid: str
    run: str
    attempt: int
    namespace: str = ""
    cluster: str = ""

    def follows(self, other: Pod) -> bool:
        """Whether KFP started it because the other one is gone.

        A training is one task of a KFP run. An earlier attempt that comes late (its node was cut
        off) does not follow the one that was started in its place.
        """
        return self.run == other.run and self.uid != other.uid and self.attempt >= other.attempt


def own_pod() -> Pod | None:
    """The pod that this process runs in; None where KFP did not start it on a cluster."""
    name, uid, run = (os.environ.get(n) for n in ("KFP_POD_NAME", "KFP_POD_UID", variables.KFP_RUN))
    if not (name and uid and run):
        return None
    attempt = os.environ.get("KFP_RETRY_INDEX", "")
    found = _cluster()
    namespace, cluster = found[1:] if found else ("", "")
    return Pod(name, uid, run, int(attempt) if attempt.isdigit() else 0, namespace, cluster)


def has_ended(pod: Pod) -> bool:
    """Whether Kubernetes says that a pod has ended, or that there is none any more.

    False where it cannot be asked: in another cluster or namespace, without the right to.
    """
    found = _cluster()
    if found is None:
        return False
    core, *place = found
    if place != [pod.namespace, pod.cluster]:
        return False
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        now: Any = core.read_namespaced_pod(
            pod.name, pod.namespace, _request_timeout=_TIMEOUT_SECONDS
        )
    except ApiException as error:
        if error.status == 404:
            return True
        logger.info("Kubernetes does not say whether pod %s lives: %s", pod.name, error.reason)
        return False
    except (HTTPError, OSError) as error:
        logger.info("Kubernetes does not say whether pod %s lives: %s", pod.name, error)
        return False
    return now.metadata.uid != pod.uid or now.status.phase in _ENDED


def _cluster() -> tuple[CoreV1Api, str, str] | None:
    """Kubernetes' API, the namespace and the cluster of this process; None outside one."""
    try:
        from kubernetes import client, config
    except ImportError:
        return None
    configuration = client.Configuration()
    kubeconfig = os.environ.get("KUBECONFIG")
    try:
        if kubeconfig:
            config.load_kube_config(kubeconfig, client_configuration=configuration)
            _, context = config.list_kube_config_contexts(kubeconfig)
            namespace = str(context["context"].get("namespace", "default"))
        else:
            config.load_incluster_config(configuration)
            namespace = _NAMESPACE.read_text(encoding="utf-8").strip()
    except (config.ConfigException, OSError):
        return None
    # Many clusters give their API the same address; the authority that signs for it is its own.
    authority = configuration.ssl_ca_cert
    signs = Path(authority).read_text(encoding="utf-8") if authority else ""
    core = client.CoreV1Api(client.ApiClient(configuration))
    return core, namespace, digest([configuration.host, signs])
