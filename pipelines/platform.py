"""A platform: what a cluster has for each kind of step, read from `recipes/platforms/*.yaml`.

The recipe says what is trained, the platform where. `python -m pipelines compile RECIPE --platform
gke-h100` puts both together; the same recipe runs on every platform.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from flagscale import variables
from flagscale.errors import UserError
from flagscale.recipe import Section, parse_section
from flagscale.recipe.section import NUMBER, PositiveInt, Source, Text
from flagscale.recipe.strict_yaml import load
from flagscale.run_values.buckets import check_bucket_url
from flagscale.run_values.kubernetes_names import ClaimName, ImageName, Name, Plain, Variable
from flagscale.run_values.network import Network
from flagscale.secrets import has_credentials, is_secret_name
from pipelines.kubernetes_values import MountPath, Quantity, Seconds, SecretKey, free
from pipelines.pods import Pods

FOLDER = Path(__file__).parents[1] / "recipes" / "platforms"
MLFLOW_VARIABLES = {
    "tracking-uri": variables.MLFLOW_URI,
    "username": variables.MLFLOW_USERNAME,
    "password": variables.MLFLOW_PASSWORD,
}  # key in the Secret: variable


class Steps(Section):
    """Kinds of steps: what they need is alike."""

    data: Pods = Field(Pods(), description="prepare-data, leaderboard: no accelerators")
    models: Pods = Field(
        Pods(memory="16Gi"),
        description="prepare-teacher, cache-teacher, convert-student, evaluate, export-student: "
        "run whole models",
    )
    training: Pods = Field(Pods(memory="16Gi"), description="distil-student")

    @model_validator(mode="after")
    def _check(self) -> Steps:
        if self.data.accelerator_count:
            raise ValueError(
                f"data.accelerator_count={self.data.accelerator_count}: these steps run no models; "
                "leave it out"
            )
        return self


class NewVolume(Section):
    """A claim made at the start of each run, and left behind with its student."""

    size: Quantity = Field(description="Kubernetes quantity")
    storage_class: Name = Field(description="KFP cannot ask for the cluster's default class")
    access_modes: tuple[Literal["ReadWriteMany", "ReadWriteOnce"], ...] = Field(
        ("ReadWriteMany",),
        min_length=1,
        description="ReadWriteMany; or ReadWriteOnce, where all pods at a time run on one node",
    )


class Shared(Section):
    """Where weights, data and checkpoints lie; KFP's artifacts then are small pointers to them."""

    claim: ClaimName | None = Field(None, description="An existing PersistentVolumeClaim")
    create: NewVolume | None = Field(None, description="Or a new one for each run")
    mount_path: MountPath = Field("/mnt/flagscale", description="Where steps see the volume")
    url: Source | None = Field(
        None, description="Or a folder of an object store, e.g. s3://bucket/distillation"
    )

    @model_validator(mode="after")
    def _check(self) -> Shared:
        ways = {"claim": self.claim, "create": self.create, "url": self.url}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"needs one of {', '.join(ways)}, but has {given or 'none'}")
        if self.url is not None:
            try:
                check_bucket_url(self.url)
            except ValueError as error:
                raise ValueError(f"url={self.url!r} {error}") from None
        if self.url is not None and "mount_path" in self.model_fields_set:
            raise ValueError(
                f"mount_path={self.mount_path} with url={self.url}: nothing is mounted"
            )
        return self

    @property
    def location(self) -> str:
        """The folder, or the URL, as a step sees it."""
        return (self.url or self.mount_path).rstrip("/")


class SecretEnvironment(Section):
    """A Kubernetes Secret whose values steps see as environment variables."""

    name: Name = Field(description="Of the Secret, in the pipeline's namespace")
    env: dict[SecretKey, Variable] = Field(min_length=1, description="Key in the Secret: variable")
    optional: bool = Field(False, description="Steps start without it too")


class Mlflow(Section):
    """The tracking server, from a Secret with keys `tracking-uri`, `username`, `password`."""

    secret: Name | None = Field(
        "mlflow", description="Name of the Secret; none: KFP's own plugin injects what steps need"
    )


class Images(Section):
    """Container images; by digest (`name@sha256:...`) the cache sees when one changes."""

    cpu: ImageName | None = Field(
        None, description="Default: FLAGSCALE_CPU_IMAGE, else the release's, in FLAGSCALE_REGISTRY"
    )
    gpu: ImageName | None = Field(
        None, description="Default: FLAGSCALE_GPU_IMAGE, else the release's, in FLAGSCALE_REGISTRY"
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="Always, IfNotPresent or Never, as in Kubernetes"
    )
    pull_secrets: tuple[Name, ...] = Field((), description="Secrets of private registries")


class Trainer(Section):
    """Kubeflow Trainer, whose TrainJobs train on several nodes, or on one that hears signals."""

    runtime: Name = Field("torch-distributed", description="A (Cluster)TrainingRuntime")
    min_nodes: Annotated[Literal[1, 2], NUMBER] = Field(
        2,
        description="`resources.nodes` from which on a training is a TrainJob; 1: always, so that "
        "one that is asked to stop saves at once",
    )
    active_deadline_seconds: Seconds | None = Field(
        None,
        description="A TrainJob that is active longer is ended, and counts as failed; the time in "
        "a queue does not count. None: steps.training.timeout_seconds",
    )
    network: Network = Network()

    @field_validator("network")
    @classmethod
    def _check_network(cls, network: Network) -> Network:
        _without_secrets(network.env)
        for path in network.host_folders.values():
            free(path)
        return network


class Runs(Section):
    """How long a run may take, and how long what Kubernetes has of it stays: KFP has the rest."""

    active_deadline_seconds: Seconds | None = Field(
        None, description="A run that takes longer is ended, and counts as failed"
    )
    ttl_seconds_after_finished: Seconds | None = Field(
        None,
        description="Kubernetes then deletes its Workflow, pods, and a TrainJob that a killed "
        "launcher left. None: the cluster's own, one day in KFP",
    )


class Platform(Section):
    """A cluster, as far as pipelines need to know it."""

    description: Text = Field("", description="For people")
    images: Images = Images()
    steps: Steps = Steps()
    shared: Shared | None = Field(
        None, description="None: weights travel through KFP's object store, checkpoints are lost"
    )
    mlflow: Mlflow = Mlflow()
    secrets: tuple[SecretEnvironment, ...] = ()
    env: dict[Variable, Plain] = Field({}, description="Of all steps; no secrets")
    trainer: Trainer = Trainer()
    runs: Runs = Runs()
    run_as_user: PositiveInt = Field(1000, description="User id of the steps, never root")

    def uses_trainjob(self, nodes: int) -> bool:
        """Whether a training on so many nodes is a TrainJob, or the work of its step's own pod."""
        return nodes >= self.trainer.min_nodes

    @field_validator("env")
    @classmethod
    def _no_secrets_in_env(cls, env: dict[str, str]) -> dict[str, str]:
        return _without_secrets(env)

    @model_validator(mode="after")
    def _each_variable_once(self) -> Platform:
        """A pod takes the last of two values of a variable, without a word."""
        givers = dict.fromkeys(variables.ALL, "the pipeline")
        if self.mlflow.secret is not None:
            given_by_it = MLFLOW_VARIABLES.values()
            # Under MLflow's own names they would be taken for KFP's, and the secret for nothing.
            in_its_place = [name.removeprefix("FLAGSCALE_") for name in given_by_it]
            givers |= dict.fromkeys([*given_by_it, *in_its_place], "mlflow.secret")
        given = [(v, f"secret {s.name}") for s in self.secrets for v in s.env.values()]
        given += [(name, "env") for name in self.env]
        given += [(name, "trainer.network.env") for name in self.trainer.network.env]
        for variable, giver in given:
            if variable in givers:
                raise ValueError(
                    f"{variable} is set by {giver} and by {givers[variable]}: leave one of them out"
                )
            givers[variable] = giver
        return self

    @model_validator(mode="after")
    def _the_longer_ends_last(self) -> Platform:
        """Or what is to end a run, or a training, in good order never does."""
        limits = {
            "trainer.active_deadline_seconds": self.trainer.active_deadline_seconds,
            "steps.training.timeout_seconds": self.steps.training.timeout_seconds,
            "runs.active_deadline_seconds": self.runs.active_deadline_seconds,
        }
        given = {name: value for name, value in limits.items() if value is not None}
        for (first, shorter), (second, longer) in pairwise(given.items()):
            if shorter > longer:
                raise ValueError(
                    f"{first}={shorter} is more than {second}={longer}, which would end it before"
                )
        return self

    @model_validator(mode="after")
    def _network_of_trainjobs(self) -> Platform:
        """What only a TrainJob's pods can have must be possible there, and said once."""
        network, training = self.trainer.network, self.steps.training
        if network == Network():
            return self
        if self.shared is None or self.shared.url:
            raise ValueError(
                "trainer.network is for TrainJobs, which need a volume: set shared.claim or "
                "shared.create, or leave it out"
            )
        if training.accelerator_type in network.resources:
            raise ValueError(
                f"trainer.network.resources.{training.accelerator_type}: "
                "steps.training.accelerator_count says how many"
            )
        for name in network.annotations:
            if name in training.annotations:
                raise ValueError(
                    f"annotation {name} is set by trainer.network and by steps.training: leave "
                    "one of them out"
                )
        return self


def _without_secrets(env: dict[str, str]) -> dict[str, str]:
    """What is written here stands in every compiled pipeline."""
    for name, value in env.items():
        if is_secret_name(name) or has_credentials(value):
            raise ValueError(
                f"{name} looks like a secret, which would stand in every compiled pipeline; "
                "put it into a Kubernetes Secret and name that in `secrets`",
            )
    return env


def load_platform(name: str | Path) -> Platform:
    """Read a platform file.

    Args:
        name: a YAML file, or the name of one in `recipes/platforms/`.

    Raises:
        UserError: there is no such file, it is no YAML, a key is given twice, or a field is
            unknown or wrong.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
    try:
        values = load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError(f"platform {name}: no such file; known names: {known}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"platform {path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"platform {path}: must be a mapping of sections, not {values!r}")
    return parse_section(Platform, values, where=f"platform {path}")
