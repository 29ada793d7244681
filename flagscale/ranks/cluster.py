"""The cluster, as the launcher of a TrainJob needs it: Kubernetes' API and Kubeflow Trainer's.

The launcher runs in a pod of the pipeline, as the pipeline's service account, whose rights are
`RULES` (`deploy/` grants them). What is missing is told by name before anything starts. On a
machine outside a cluster, `KUBECONFIG` says which one is meant.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flagscale.errors import UserError
from flagscale.ranks.nodes import IN_ONE_POD

if TYPE_CHECKING:
    from kubeflow.trainer import TrainerClient

logger = logging.getLogger(__name__)

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT_SECONDS = 30
_PODS_OF = "jobset.sigs.k8s.io/jobset-name={name}"


class Rule(NamedTuple):
    """A rule of RBAC.

    Attributes:
        group: API group, "" for Kubernetes' own.
        resource: plural, with `/` before a subresource.
        verbs: what may be done with it.
    """

    group: str
    resource: str
    verbs: tuple[str, ...]


RULES = (
    Rule("", "pods", ("get", "list")),
    Rule("", "pods/log", ("get",)),
    Rule(GROUP, PLURAL, ("create", "delete", "get", "list")),
    Rule(GROUP, "trainingruntimes", ("get",)),
    Rule(GROUP, "clustertrainingruntimes", ("get",)),
)


class Cluster:
    """One namespace of a cluster."""

    def __init__(self) -> None:
        """Connect with the pod's service account, or with `KUBECONFIG`.

        Raises:
            UserError: the libraries are not installed, or there is no cluster here.
        """
        try:
            from kubeflow.common.types import KubernetesBackendConfig
            from kubeflow.trainer import TrainerClient
            from kubernetes.config import ConfigException
        except ImportError as error:
            raise UserError(
                f"a TrainJob needs a package that is not installed here: {error}; "
                "use the release's image, or `pip install 'flagscale-distillation[cluster]'`"
            ) from error
        kubeconfig = os.environ.get("KUBECONFIG")
        try:
            self.namespace = _namespace(kubeconfig)
            configuration = KubernetesBackendConfig(
                namespace=self.namespace, config_file=kubeconfig
            )
            self._trainer: TrainerClient = TrainerClient(configuration)
        except (ConfigException, OSError) as error:
            raise UserError(
                f"no cluster: {error}; a TrainJob is started by a pod of the pipeline. "
                "`python -m pipelines run` trains on this machine"
            ) from error
        backend: Any = self._trainer.backend
        self._core, self._custom = backend.core_api, backend.custom_api

    def check(self, runtime: str) -> str:
        """Make sure that a TrainJob can be made, followed and deleted.

        Args:
            runtime: name of the TrainingRuntime.

        Returns:
            The runtime's kind: one of the namespace, or of the cluster.

        Raises:
            UserError: a right, Kubeflow Trainer or the runtime is missing.
        """
        self._check_rights()
        with self._explained("list TrainJobs"):
            try:
                self._custom.list_namespaced_custom_object(*self._trainjobs, limit=1, **_patience())
            except self._api_error as error:
                if error.status == 404:
                    raise UserError(
                        "Kubeflow Trainer is not installed in this cluster: it knows no "
                        f"{GROUP}/{VERSION} TrainJob. Install Trainer 2.3 or later "
                        f"(docs/cluster.md), or train {IN_ONE_POD}"
                    ) from error
                raise
        with self._explained(f"read TrainingRuntime {runtime}"):
            try:
                found = self._trainer.get_runtime(runtime)
            except RuntimeError as error:
                if _status(error) == 404:
                    raise UserError(
                        f"there is no TrainingRuntime or ClusterTrainingRuntime named {runtime!r} "
                        "(`trainer.runtime` of the platform file); `kubectl get "
                        "clustertrainingruntimes,trainingruntimes` shows what there is"
                    ) from error
                raise
        if found.trainer.framework != "torch":
            raise UserError(
                f"TrainingRuntime {runtime!r} (`trainer.runtime` of the platform file) is for "
                f"{found.trainer.framework}; a torch runtime is needed, e.g. torch-distributed"
            )
        return str(found.kind.value)

    def pod(self, name: str) -> dict[str, Any]:
        """A pod, as Kubernetes' API shows it.

        Raises:
            UserError: it cannot be read.
        """
        with self._explained(f"read pod {name}"):
            found = self._core.read_namespaced_pod(name, self.namespace, **_patience())
        return self._plain(found)

    def create(self, manifest: dict[str, Any]) -> None:
        """Create a TrainJob.

        Raises:
            UserError: Trainer does not take it, or one of this name exists.
        """
        with self._explained(f"create TrainJob {manifest['metadata']['name']}"):
            self._custom.create_namespaced_custom_object(*self._trainjobs, manifest, **_patience())

    def find(self, name: str) -> dict[str, Any] | None:
        """A TrainJob, None if there is none.

        Raises:
            UserError: the API does not answer, or refuses.
        """
        with self._explained(f"read TrainJob {name}"):
            try:
                found: dict[str, Any] = self._custom.get_namespaced_custom_object(
                    *self._trainjobs, name, **_patience()
                )
            except self._api_error as error:
                if error.status == 404:
                    return None
                raise
        return found

    def delete(self, name: str) -> None:
        """Delete a TrainJob, if there is one; its pods get SIGTERM.

        Raises:
            UserError: the API does not answer, or refuses.
        """
        with self._explained(f"delete TrainJob {name}"):
            try:
                self._custom.delete_namespaced_custom_object(*self._trainjobs, name, **_patience())
            except self._api_error as error:
                if error.status != 404:
                    raise

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The pods of a TrainJob.

        Raises:
            UserError: the API does not answer, or refuses.
        """
        selector = _PODS_OF.format(name=name)
        with self._explained(f"list the pods of TrainJob {name}"):
            found = self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, **_patience()
            )
        return [self._plain(pod) for pod in found.items]

    def log(self, name: str, follow: bool = True) -> Iterator[str]:
        """Lines of the first node's log, from its beginning; none before it runs.

        Raises:
            UserError: the API does not answer, or breaks off.
        """
        with self._explained(f"read the log of TrainJob {name}"):
            yield from self._trainer.get_job_logs(name, follow=follow)

    def _check_rights(self) -> None:
        """Ask Kubernetes for each right; where it does not answer, the calls themselves will."""
        from kubernetes import client
        from urllib3.exceptions import HTTPError

        api = client.AuthorizationV1Api(self._core.api_client)
        missing = []
        try:
            for rule in RULES:
                for verb in rule.verbs:
                    review = _review(client, rule, verb, self.namespace)
                    status = api.create_self_subject_access_review(review, **_patience()).status
                    if not status.allowed:
                        missing.append(f"{verb} {rule.resource} ({rule.group or 'core'})")
        except (client.ApiException, HTTPError) as error:
            logger.debug("rights not known beforehand: %s", error)
        if missing:
            raise UserError(self._no_right(", ".join(missing)))

    def _no_right(self, what: str) -> str:
        return (
            f"the pipeline's service account may not, in namespace {self.namespace}: {what}; "
            "apply deploy/base/rbac.yaml (docs/cluster.md)"
        )

    @property
    def _trainjobs(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    @property
    def _api_error(self) -> type[Any]:
        from kubernetes.client import ApiException

        return ApiException

    def _plain(self, value: Any) -> dict[str, Any]:  # noqa: ANN401 - kubernetes' models
        plain: dict[str, Any] = self._core.api_client.sanitize_for_serialization(value)
        return plain

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """What the API's clients raise, as an error that says what to do."""
        from urllib3.exceptions import HTTPError

        try:
            yield
        except (self._api_error, HTTPError, RuntimeError, TimeoutError, OSError) as error:
            status = _status(error)
            if status == 403:
                raise UserError(self._no_right(doing)) from error
            raise UserError(f"cannot {doing}: {_told(error)}") from error


def _namespace(kubeconfig: str | None) -> str:
    if kubeconfig is None:
        return _NAMESPACE.read_text(encoding="utf-8").strip()
    from kubernetes import config

    _, context = config.list_kube_config_contexts(config_file=kubeconfig)
    return str(context["context"].get("namespace", "default"))


def _review(client: Any, rule: Rule, verb: str, namespace: str) -> Any:  # noqa: ANN401
    resource, _, subresource = rule.resource.partition("/")
    attributes = client.V1ResourceAttributes(
        group=rule.group,
        resource=resource,
        subresource=subresource or None,
        verb=verb,
        # A ClusterTrainingRuntime has no namespace: the right must hold everywhere.
        namespace=None if resource.startswith("cluster") else namespace,
    )
    spec = client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
    return client.V1SelfSubjectAccessReview(spec=spec)


def _patience() -> dict[str, int]:
    return {"_request_timeout": _TIMEOUT_SECONDS}


def _status(error: BaseException | None) -> int | None:
    """HTTP status of what the API answered; the SDK hides it behind errors of its own."""
    while error is not None:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _told(error: BaseException) -> str:
    """What the API's server said, or the last cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    body = getattr(error, "body", None)
    if body:
        return f"{getattr(error, 'status', '')} {_message(body)}"
    return f"{type(error).__name__}: {error}"


def _message(body: Any) -> str:  # noqa: ANN401 - text or bytes
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()
