"""What `make test-cluster` is told, by variables."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import UserError
from pipelines.platform import load_platform
from pipelines.where import location

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "build" / "tiny-teacher"
# Long enough for a pod to be lost between two checkpoints, and still a minute of work.
SAVE_INTERVAL = 50
TRAINING = (
    "training.train_iters=600",
    f"training.save_interval={SAVE_INTERVAL}",
    f"training.eval_interval={SAVE_INTERVAL}",
)


@dataclass(frozen=True)
class Settings:
    """One go.

    Attributes:
        platform: name or file, as `--platform` takes it.
        teacher: the tiny teacher as pods see it.
        name: of the recipe, the pipeline, the experiments and the runs; unlike any other.
        namespace: of the pods.
        shared: folder or URL where checkpoints outlive a pod; None: nowhere.
        kubeconfig: whether Kubernetes' API is asked too.
        tracking: MLflow's address from here; None: it is not reached.
        minutes: after which what has not ended has failed.
        keep: whether runs and pipelines are left for people to look at.
    """

    platform: str
    teacher: str
    name: str
    namespace: str
    shared: str | None
    kubeconfig: bool
    tracking: str | None
    minutes: float = 20.0
    keep: bool = False

    @property
    def recipe(self) -> list[str]:
        """The tiny recipe, changed for this go, as arguments of a command."""
        return self.changed(self.teacher)

    def changed(self, teacher: str) -> list[str]:
        """The same with another path to the teacher."""
        sets = (
            f"name={self.name}",
            f"teacher.source={teacher}",
            f"tracking.experiment={self.name}",
            *TRAINING,
        )
        return [str(ROOT / "recipes" / "tiny.yaml"), *(f"--set={text}" for text in sets)]


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings, once nothing is missing.

    Raises:
        UserError: what is missing, all of it.
    """
    missing = []
    if not (environment.get("KFP_ENDPOINT") or environment.get("KF_PIPELINES_ENDPOINT")):
        missing.append("KFP_ENDPOINT, the server's address")
    if not environment.get("PLATFORM"):
        missing.append("PLATFORM, a platform file or a name in recipes/platforms/")
    if not environment.get("TEACHER"):
        missing.append(
            "TEACHER, the folder build/tiny-teacher as pods see it, e.g. "
            "/mnt/flagscale/tiny-teacher on the shared volume (docs/cluster.md says how it gets "
            "there)"
        )
    if missing:
        raise UserError("make test-cluster needs " + "; ".join(missing))
    platform = environment["PLATFORM"]
    return Settings(
        platform=platform,
        teacher=environment["TEACHER"],
        name=f"tiny-{secrets.token_hex(4)}",
        namespace=environment.get("KFP_NAMESPACE") or "kubeflow",
        shared=location(load_platform(platform)),
        kubeconfig=bool(environment.get("KUBECONFIG")),
        tracking=environment.get("MLFLOW_TRACKING_URI") or None,
        minutes=_minutes(environment.get("MINUTES") or "20"),
        keep=environment.get("KEEP") == "1",
    )


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"MINUTES={text}: must be a number of minutes, more than 0")
    return value
