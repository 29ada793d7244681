"""The cluster, as the launcher of a TrainJob needs it: Kubernetes' API and Kubeflow Trainer's.

The launcher runs in a pod of the pipeline, as the pipeline's service account (`rights`). On a
machine outside a cluster, `KUBECONFIG` says which one is meant. What is asked once, at the start,
outlasts an API server that is away (`flagscale.patience`); what is asked again and again does not
need to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from flagscale.errors import UserError
from flagscale.execution.trainjob import rights
from flagscale.execution.trainjob.api_errors import is_api_away, status_of, told
from flagscale.execution.trainjob.connecting import is_on_host_network, namespace, version_unread
from flagscale.execution.trainjob.nodes import IN_ONE_POD
from flagscale.execution.trainjob.rights import GROUP, PLURAL, VERSION
from flagscale.patience import patiently

if TYPE_CHECKING:
    from kubeflow.trainer import TrainerClient

logger = logging.getLogger(__name__)

T = TypeVar("T")
_TIMEOUT_SECONDS = 30
_PODS_OF = "jobset.sigs.k8s.io/jobset-name={name}"


class Cluster:
    """One namespace of a cluster."""

    def __init__(self, pauses: Sequence[float] | None = None) -> None:
        """Connect with the pod's service account, or with `KUBECONFIG`.

        Args:
            pauses: see `flagscale.patience.patiently`.

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
            self.namespace = namespace(kubeconfig)
            configuration = KubernetesBackendConfig(
                namespace=self.namespace, config_file=kubeconfig
            )
            with version_unread():
                self._trainer: TrainerClient = TrainerClient(configuration)
        except (ConfigException, OSError) as error:
            raise UserError(
                f"no cluster: {error}; a TrainJob is started by a pod of the pipeline. "
                "`python -m pipelines run` trains on this machine"
            ) from error
        backend: Any = self._trainer.backend
        self._core, self._custom = backend.core_api, backend.custom_api
        self._pauses = pauses

    def check(self, runtime: str, host_network: bool = False) -> str:
        """Make sure that a TrainJob can be made, followed and deleted.

        Args:
            runtime: name of the TrainingRuntime.
            host_network: whether its pods must be on the nodes' own network.

        Returns:
            The runtime's kind: one of the namespace, or of the cluster.

        Raises:
            UserError: a right, Kubeflow Trainer or the runtime is missing, or is another than is
                needed.
        """
        self._check_rights()
        self._ask("list TrainJobs", self._list_one)
        found = self._ask(f"read TrainingRuntime {runtime}", lambda: self._runtime(runtime))
        if found.trainer.framework != "torch":
            raise UserError(
                f"TrainingRuntime {runtime!r} (`trainer.runtime` of the platform file) is for "
                f"{found.trainer.framework}; a torch runtime is needed, e.g. torch-distributed"
            )
        kind = str(found.kind.value)
        if host_network:
            doing = f"read the pods of {kind} {runtime}"
            if not is_on_host_network(self._ask(doing, lambda: self._read_runtime(kind, runtime))):
                raise UserError(
                    f"trainer.network.host_network=true, but the pods of {kind} {runtime!r} "
                    "(`trainer.runtime`) have no hostNetwork: true, and a TrainJob cannot ask for "
                    "it; apply deploy/host-network.yaml and name that one"
                )
        return kind

    def pod(self, name: str) -> dict[str, Any]:
        """A pod, as Kubernetes' API shows it.

        Raises:
            UserError: it cannot be read.
        """
        return self._plain(
            self._ask(
                f"read pod {name}",
                lambda: self._core.read_namespaced_pod(name, self.namespace, **_timeout()),
            )
        )

    def create(self, manifest: dict[str, Any]) -> None:
        """Create a TrainJob, once: also where the answer to the first request was lost.

        Raises:
            UserError: Trainer does not take it, or another one of this name exists.
        """
        name = manifest["metadata"]["name"]

        def create() -> None:
            try:
                self._custom.create_namespaced_custom_object(
                    *self._trainjobs, manifest, **_timeout()
                )
            except self._api_error as error:
                if error.status != 409 or not _is_same(self.find(name), manifest):
                    raise

        self._ask(f"create TrainJob {name}", create)

    def find(self, name: str) -> dict[str, Any] | None:
        """A TrainJob, None if there is none.

        Raises:
            UserError: the API does not answer, or refuses.
        """
        with self._explained(f"read TrainJob {name}"):
            try:
                found: dict[str, Any] = self._custom.get_namespaced_custom_object(
                    *self._trainjobs, name, **_timeout()
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
                self._custom.delete_namespaced_custom_object(*self._trainjobs, name, **_timeout())
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
                self.namespace, label_selector=selector, **_timeout()
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
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            missing = rights.missing(self._core.api_client, self.namespace, **_timeout())
        except (ApiException, HTTPError) as error:
            logger.debug("rights not known beforehand: %s", error)
            return
        if missing:
            raise UserError(self._no_right(", ".join(missing)))

    def _list_one(self) -> None:
        try:
            self._custom.list_namespaced_custom_object(*self._trainjobs, limit=1, **_timeout())
        except self._api_error as error:
            if error.status == 404:
                raise UserError(
                    "Kubeflow Trainer is not installed in this cluster: it knows no "
                    f"{GROUP}/{VERSION} TrainJob. Install Trainer 2.3 or later "
                    f"(docs/cluster.md), or train {IN_ONE_POD}"
                ) from error
            raise

    def _runtime(self, name: str) -> Any:  # noqa: ANN401 - the SDK's
        try:
            return self._trainer.get_runtime(name)
        except RuntimeError as error:
            if status_of(error) == 404:
                raise UserError(
                    f"there is no TrainingRuntime or ClusterTrainingRuntime named {name!r} "
                    "(`trainer.runtime` of the platform file); `kubectl get "
                    "clustertrainingruntimes,trainingruntimes` shows what there is"
                ) from error
            raise

    def _read_runtime(self, kind: str, name: str) -> dict[str, Any]:
        """The whole object: the SDK's has nothing of the pods."""
        found: dict[str, Any]
        if kind == "TrainingRuntime":
            place = (GROUP, VERSION, self.namespace, "trainingruntimes", name)
            found = self._custom.get_namespaced_custom_object(*place, **_timeout())
        else:
            of_all = (GROUP, VERSION, "clustertrainingruntimes", name)
            found = self._custom.get_cluster_custom_object(*of_all, **_timeout())
        return found

    def _ask(self, doing: str, call: Callable[[], T]) -> T:
        """Ask the API, patiently."""
        with self._explained(doing):
            return patiently(call, doing, is_api_away, self._pauses)

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
            status = status_of(error)
            if status == 403:
                raise UserError(self._no_right(doing)) from error
            raise UserError(f"cannot {doing}: {told(error)}") from error


def _is_same(found: dict[str, Any] | None, manifest: dict[str, Any]) -> bool:
    """Whether a TrainJob is this very one: its ranks' folder is nobody else's."""
    return (
        found is not None
        and found["metadata"].get("ownerReferences") == manifest["metadata"]["ownerReferences"]
        and found["spec"]["trainer"].get("env") == manifest["spec"]["trainer"]["env"]
    )


def _timeout() -> dict[str, int]:
    return {"_request_timeout": _TIMEOUT_SECONDS}
