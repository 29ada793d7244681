"""Clusters for tests: a kubeconfig, and settings of Argo's controller."""

KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "SERVER"}}]
users: [{name: u, user: {}}]
contexts: [{name: lab, context: {cluster: c, user: u}}, {name: lost, context: {cluster: x}}]
current-context: lab
"""

RIGHT = """\
retryPolicy: Always, limit: '2', expression: 'lastRetry.status == "Error" ||
  (asInt(lastRetry.exitCode) in [137, 143] && !(lastRetry.message contains "OOMKilled"))'"""
OF_KFP_2_17 = "limit: '2', retryPolicy: OnError"


def settings(strategy: str) -> dict[str, str]:
    """The controller's ConfigMap, with a retry strategy for every template."""
    return {"workflowDefaults": f"spec: {{templateDefaults: {{retryStrategy: {{{strategy}}}}}}}"}
