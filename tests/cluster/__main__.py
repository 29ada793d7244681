"""Checks a cluster with the tiny recipe, from upload to report: `make test-cluster`.

environment:
  KFP_ENDPOINT, KFP_NAMESPACE, ...  the server, as for `python -m pipelines submit`
  PLATFORM                          a platform file, or a name in recipes/platforms/
  TEACHER                           build/tiny-teacher as pods see it, e.g. on the shared volume
  MLFLOW_TRACKING_URI               MLflow from here: figures, trees and weights are compared
  KUBECONFIG                        Kubernetes too: policy of retries, lost pods, two nodes
  MINUTES=20                        after which what has not ended has failed
  KEEP=1                            leave runs and pipeline there
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.__main__ import ended
from tests.cluster.checks import Checks
from tests.cluster.local import LocalRun
from tests.cluster.runs import Runs
from tests.cluster.settings import Settings, read_settings
from tests.cluster.table import Table


def check_cluster(settings: Settings, table: Table, pause_seconds: float = 5.0) -> int:
    """All checks; the exit code is 1 where one failed.

    Args:
        settings: what is checked, and with what.
        table: gets the outcomes.
        pause_seconds: between two looks.

    Raises:
        UserError: there is no server there.
    """
    runs = Runs(settings, pause_seconds)
    table.tell(f"{settings.name} on {settings.platform}, at most {settings.minutes:g} minutes")
    with TemporaryDirectory(prefix="flagscale-") as folder:
        local = LocalRun(settings, Path(folder)) if settings.tracking else None
        try:
            Checks(settings, table, runs, local).go()
        finally:
            if local is not None:
                local.stop()
    return table.end()


def _main() -> int:
    code = 0

    def work() -> str:
        nonlocal code
        code = check_cluster(read_settings(), Table())
        return ""

    return ended(work) or code


if __name__ == "__main__":
    sys.exit(_main())
