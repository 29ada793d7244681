import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.cluster.kfp_server import KfpServer


@pytest.fixture
def kfp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A KFP server in `KFP_ENDPOINT`; nothing of this machine's own configuration is seen."""
    ours = ("KFP_", "KF_PIPELINES_", "KUBECONFIG", "KUBERNETES_SERVICE_")
    for name in [n for n in os.environ if n.startswith(ours)]:
        monkeypatch.delenv(name)
    # It was read from KUBECONFIG when the module was imported.
    location = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(location, str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("kfp.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    with KfpServer().serving() as server:
        monkeypatch.setenv("KFP_ENDPOINT", server.url)
        yield server
