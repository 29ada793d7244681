"""How a cluster repeats what failed: the retry policy of its Argo, read and judged.

KFP compiles a step's count and waiting time, but no policy. That comes from `workflowDefaults` of
Argo's controller, which are merged into every template: also into those that a step is in.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import urllib3
import yaml
from kubernetes import client, config

from pipelines.cluster.connection import Connection

CONFIG_MAP = "workflow-controller-configmap"
_KFPS_NAMESPACE = "kubeflow"
_TIMEOUT_SECONDS = (5.0, 10.0)
_REMEDY = "a right one is in deploy/components/retry-policy; docs/cluster.md, retries"
_STOPPED = ("137", "143")  # killed, and stopped: exit codes that KFP's launcher lets through

_VANISHED = "a step whose pod vanishes with its node is not repeated"
_LOST = "a step whose pod is stopped, killed or lost may not be repeated"
_MULTIPLIED = (
    "a step that fails by a mistake is repeated as often as its retries say, times the limit for "
    "each level that it is in"
)


@dataclass(frozen=True)
class RetryPolicy:
    """What Argo's controller adds to every template.

    Attributes:
        limit: repetitions of whatever has none of its own; None: without end.
        policy: Argo's: Always, OnFailure, OnError or OnTransientError.
        expression: of the last attempt; what it does not hold for is not repeated.
        is_set: whether the controller adds anything at all.
    """

    limit: str | None = None
    policy: str = "OnFailure"  # Argo's, where nothing is said
    expression: str = ""
    is_set: bool = True

    @property
    def danger(self) -> str | None:
        """What it does that costs GPUs, or loses a training; None: it is right."""
        if not self.is_set:
            return f"sets no policy: {_VANISHED}, and one that fails by a mistake is repeated"
        if self.limit is None:
            return "has no limit: what a failed step is in is begun anew without end"
        if self.expression:
            missing = [c for c in ("Error", *_STOPPED) if c not in self.expression]
            return (
                f"has an expression without {' and '.join(missing)}: {_LOST}" if missing else None
            )
        if self.policy == "Always":
            return f"is Always, without an expression: {_MULTIPLIED}"
        if self.policy == "OnFailure":
            return f"is OnFailure: {_MULTIPLIED}, and {_VANISHED}"
        return f"is {self.policy}: a step whose pod is stopped or killed is not repeated"


def read_retry_policy(connection: Connection) -> RetryPolicy | None:
    """The policy of the cluster that a kubeconfig's context or this pod's account tells.

    Args:
        connection: with a context of kubectl's, or made inside a cluster.

    Returns:
        None where there is no cluster, or no right to look: nothing is known then.
    """
    api = _cluster(connection)
    if api is None:
        return None
    for namespace in dict.fromkeys((_KFPS_NAMESPACE, connection.namespace or _KFPS_NAMESPACE)):
        try:
            found = api.read_namespaced_config_map(
                CONFIG_MAP, namespace, _request_timeout=_TIMEOUT_SECONDS
            )
        except (client.ApiException, urllib3.exceptions.HTTPError):
            continue
        return parse_retry_policy(found.data or {})
    return None


def parse_retry_policy(data: dict[str, str]) -> RetryPolicy | None:
    """The policy in the controller's settings.

    Args:
        data: of the ConfigMap: a key each, or all in the key `config`.

    Returns:
        None where they cannot be read.
    """
    try:
        settings = yaml.safe_load(data.get("config") or "{}")
        defaults = yaml.safe_load(data.get("workflowDefaults") or "null")
        defaults = defaults or settings.get("workflowDefaults") or {}
        strategy = defaults.get("spec", {}).get("templateDefaults", {}).get("retryStrategy")
    except (yaml.YAMLError, AttributeError):
        return None
    if not strategy:
        return RetryPolicy(is_set=False)
    return _of_strategy(strategy) if isinstance(strategy, dict) else None


def warning(policy: RetryPolicy | None) -> str | None:
    """One line for whoever starts a run; None where there is nothing to warn of."""
    if policy is None or policy.danger is None:
        return None
    return f"warning: the retry policy of this cluster {policy.danger} ({_REMEDY})"


def _of_strategy(strategy: dict[str, Any]) -> RetryPolicy:
    limit, expression = strategy.get("limit"), str(strategy.get("expression") or "")
    # Argo takes an expression alone as a policy for whatever it holds for.
    policy = strategy.get("retryPolicy") or ("Always" if expression else "OnFailure")
    return RetryPolicy(None if limit is None else str(limit), str(policy), expression)


def _cluster(connection: Connection) -> client.CoreV1Api | None:
    """The API of the cluster that KFP runs in, where something says which that is."""
    settings = client.Configuration()
    settings.retries = False
    try:
        if connection.kube_context is None and _is_inside():
            config.load_incluster_config(client_configuration=settings)
        elif connection.kube_context is not None or connection.host is None:
            context = connection.kube_context
            config.load_kube_config(context=context, client_configuration=settings)
        else:
            return None
    except Exception:  # of a file with any content; who needs it has been told before
        return None
    return client.CoreV1Api(client.ApiClient(settings))


def _is_inside() -> bool:
    return config.incluster_config.SERVICE_HOST_ENV_NAME in os.environ
