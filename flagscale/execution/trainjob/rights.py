"""What the pipeline's service account must be allowed, so that a step can start a TrainJob.

`deploy/` grants it. What is missing is told by name before anything starts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"


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


def missing(api_client: Any, namespace: str, **options: Any) -> list[str]:  # noqa: ANN401
    """The rights that this account lacks, for people.

    Args:
        api_client: of the kubernetes client.
        namespace: where it wants to do something.
        options: of each request.

    Raises:
        kubernetes.client.ApiException: Kubernetes does not say.
    """
    from kubernetes import client

    api = client.AuthorizationV1Api(api_client)
    found = []
    for rule in RULES:
        for verb in rule.verbs:
            review = _review(client, rule, verb, namespace)
            if not api.create_self_subject_access_review(review, **options).status.allowed:
                found.append(f"{verb} {rule.resource} ({rule.group or 'core'})")
    return found


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
