"""Puts a pipeline's tasks where a platform says: nodes, volumes, secrets, retries.

What KFP can take at run time becomes a parameter of the pipeline whose default is the platform's
(`pipelines.where`); the rest is written into the compiled file. Without a platform, on this
machine, there is nothing to place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfp import dsl, kubernetes

from flagscale import variables
from flagscale.errors import UserError
from flagscale.recipe import Recipe
from pipelines.platform import MLFLOW_VARIABLES, Platform, Shared
from pipelines.pods import Pods
from pipelines.where import pods_of


def check(platform: Platform, recipe: Recipe) -> None:
    """Refuse a training that the platform's pods could not hold.

    Raises:
        UserError: which of their values do not go together.
    """
    wanted, there = recipe.resources.accelerator_count, platform.steps.training.accelerator_count
    if wanted is not None and 0 < there < wanted:
        raise UserError(
            f"recipe {recipe.name} on this platform: resources.accelerator_count={wanted}, but a "
            f"training pod has {there} here; leave it out to use all of them"
        )
    accelerators = pods_of(platform, recipe, "training").accelerator_count
    if not accelerators:
        try:
            recipe.check_on_cpu()
        except ValueError as error:
            raise UserError(f"recipe {recipe.name} on this platform: {error}") from error
    try:
        recipe.check_models(platform.steps.models.accelerator_count)
        recipe.check_accelerators(accelerators)
    except ValueError as error:
        raise UserError(
            f"recipe {recipe.name} on this platform: {error}; resources.accelerator_count makes "
            "a training pod use fewer"
        ) from error
    if platform.uses_trainjob(recipe.resources.nodes):
        _check_volume(platform, recipe.resources.nodes)
    if recipe.search is not None and platform.shared is None:
        raise UserError(
            f"recipe {recipe.name} on this platform: a search's trainings go on from rung to rung "
            "by checkpoints that outlive their pods: set shared.claim, shared.create or shared.url "
            "there"
        )


def _check_volume(platform: Platform, nodes: int) -> None:
    """Refuse a TrainJob whose nodes would not see what its launcher's pod sees.

    Raises:
        UserError: what the platform must have.
    """
    shared, why = platform.shared, f"resources.nodes={nodes}"
    if nodes == 1:
        why += f" with trainer.min_nodes={platform.trainer.min_nodes}"
    if shared is None or shared.url:
        raise UserError(
            f"{why} needs a volume that all nodes see, but the platform's "
            f"shared={shared and shared.url}: set shared.claim or shared.create there, or choose "
            "another --platform"
        )
    if shared.create is not None and "ReadWriteMany" not in shared.create.access_modes:
        raise UserError(
            f"{why} needs a volume that all nodes see, but "
            f"shared.create.access_modes={list(shared.create.access_modes)}: must have "
            "ReadWriteMany"
        )


def pipeline_config(platform: Platform | None) -> dsl.PipelineConfig | None:
    """How long a run may take, and what Kubernetes has of it stays; None on this machine."""
    return dsl.PipelineConfig(**platform.runs.model_dump()) if platform else None


class Placement:
    """Places the tasks of one pipeline; made inside the pipeline's function.

    Args:
        platform: None to leave every task alone.
        recipe: its resources.
        values: the pipeline's parameters by name.
    """

    def __init__(
        self, platform: Platform | None, recipe: Recipe, values: Mapping[str, Any]
    ) -> None:
        self._platform = platform
        self._recipe = recipe
        self._values = values
        self._tasks: dict[str, dsl.PipelineTask] = {}
        self._claim: Any = values.get("where_volume_claim")

    @property
    def on_a_cluster(self) -> bool:
        """Whether there is a platform."""
        return self._platform is not None

    @property
    def caches_teacher(self) -> bool:
        """Whether there is to be a step that asks the teacher for all trainings."""
        return self._recipe.caches_teacher

    @property
    def evaluates_tasks(self) -> bool:
        """Whether there is to be a step that asks lm-eval's tasks."""
        return self._recipe.tasks.is_asked

    @property
    def measures_layers_once(self) -> bool:
        """Whether there is to be a step that measures layers for all students."""
        return self._recipe.measures_layers_once

    def has(self, step: str) -> bool:
        """Whether a step's task has been placed."""
        return step in self._tasks

    def task(self, step: str) -> dsl.PipelineTask:
        """The step's task, which has been placed."""
        return self._tasks[step]

    @property
    def nodes(self) -> int:
        """Pods that train together; on this machine always one."""
        return self._recipe.resources.nodes if self._platform else 1

    @property
    def uses_trainjob(self) -> bool:
        """Whether the training's task starts other pods; on this machine never."""
        return self._platform is not None and self._platform.uses_trainjob(self.nodes)

    @property
    def node_pods(self) -> dict[str, Any]:
        """What a TrainJob's launcher is told of its pods (`NodePods` there)."""
        assert self._platform is not None
        pods = pods_of(self._platform, self._recipe, "training")
        names = {"cpu", "memory", "accelerator_type", "timeout_seconds"}
        told = pods.model_dump(mode="json", include=names, exclude_none=True)
        trainer = self._platform.trainer
        told |= {"runtime": trainer.runtime, "restarts": pods.retries.count}
        if trainer.active_deadline_seconds is not None:
            told["timeout_seconds"] = trainer.active_deadline_seconds
        network = trainer.network.model_dump(mode="json", exclude_defaults=True)
        more = {"annotations": dict(pods.annotations), "network": network}
        return told | {name: value for name, value in more.items() if value}

    def create_volume(self, after: dsl.PipelineTask) -> None:
        """Make the run's own volume, where the platform says so, for the tasks placed from here on.

        Args:
            after: the task without which there is to be none.
        """
        if self._platform and self._platform.shared and self._platform.shared.create:
            self._claim = _new_volume(self._platform, after)

    def place(
        self,
        task: dsl.PipelineTask,
        kind: str,
        title: str,
        small: bool = False,
        storage: bool = True,
    ) -> dsl.PipelineTask:
        """Give a task what its kind gets.

        Args:
            task: just made.
            kind: `data`, `models` or `training`.
            title: what the UI shows.
            small: for a task that needs little itself, e.g. a launcher.
            storage: False for a task that needs nothing of what steps share.
        """
        task.set_display_name(title)
        self._tasks[task.component_spec.name] = task
        platform = self._platform
        if platform is None:
            return task
        pods = pods_of(platform, self._recipe, kind)
        self._resources(task, kind, pods, small)
        self._nodes(task, kind, pods)
        self._scratch(task, pods)
        if storage and platform.shared is not None:
            self._share(task, platform.shared)
        self._surroundings(task, platform)
        task.set_retry(
            pods.retries.count,
            backoff_duration=pods.retries.backoff,
            backoff_factor=float(pods.retries.factor),
            backoff_max_duration=pods.retries.max_duration,
        )
        if pods.timeout_seconds is not None:
            kubernetes.set_timeout(task, pods.timeout_seconds)
        return task

    def _resources(self, task: dsl.PipelineTask, kind: str, pods: Pods, small: bool) -> None:
        task.set_container_image(self._values[f"where_{kind}_image"])
        task.set_cpu_request("1" if small else pods.cpu)
        memory = "4Gi" if small else pods.memory
        task.set_memory_request(memory).set_memory_limit(memory)
        if not small and kind != "data":
            task.set_accelerator_type(pods.accelerator_type)
            count = self._values[f"where_{kind}_accelerator_count"]
            task.set_accelerator_limit(count)
            # KFP forgets to pass it into a loop, whose tasks would look for it there in vain.
            task.register_pipeline_channels([count])

    def _nodes(self, task: dsl.PipelineTask, kind: str, pods: Pods) -> None:
        kubernetes.add_node_selector_json(task, self._values[f"where_{kind}_node_selector"])
        kubernetes.add_toleration_json(task, self._values[f"where_{kind}_tolerations"])
        for key, value in pods.all_labels.items():
            kubernetes.add_pod_label(task, key, value)
        for key, value in pods.annotations.items():
            kubernetes.add_pod_annotation(task, key, value)

    def _scratch(self, task: dsl.PipelineTask, pods: Pods) -> None:
        kubernetes.empty_dir_mount(task, "tmp", "/tmp")  # noqa: S108 - the root may be read-only
        if pods.shared_memory is not None:
            kubernetes.empty_dir_mount(
                task,
                "dshm",
                "/dev/shm",  # noqa: S108
                medium="Memory",
                size_limit=pods.shared_memory,
            )

    def _share(self, task: dsl.PipelineTask, shared: Shared) -> None:
        task.set_env_variable(variables.SHARED, shared.location)
        if self._claim is not None:
            kubernetes.mount_pvc(task, self._claim, shared.mount_path)

    def _surroundings(self, task: dsl.PipelineTask, platform: Platform) -> None:
        kubernetes.set_security_context(
            task,
            run_as_user=platform.run_as_user,
            run_as_group=platform.run_as_user,
            run_as_non_root=True,
        )
        kubernetes.set_image_pull_policy(task, platform.images.pull_policy)
        if platform.images.pull_secrets:
            kubernetes.set_image_pull_secrets(task, list(platform.images.pull_secrets))
        # Steps of one run find one another in MLflow by it.
        kubernetes.use_field_path_as_env(
            task, variables.KFP_RUN, "metadata.labels['pipeline/runid']"
        )
        task.set_env_variable(variables.RUN_NAME, self._recipe.name)
        if platform.mlflow.secret is not None:
            secret = self._values["where_mlflow_secret"]
            credentials = dict(MLFLOW_VARIABLES)
            address = {"tracking-uri": credentials.pop("tracking-uri")}
            kubernetes.use_secret_as_env(task, secret, address)
            kubernetes.use_secret_as_env(task, secret, credentials, optional=True)
        for secret in platform.secrets:
            kubernetes.use_secret_as_env(task, secret.name, dict(secret.env), secret.optional)
        if platform.secrets:
            # Their names may not look it, and logs are to hide them all (`flagscale.secrets`).
            names = [name for secret in platform.secrets for name in secret.env.values()]
            task.set_env_variable(variables.SECRETS, ",".join(names))
        for name, value in platform.env.items():
            task.set_env_variable(name, value)


def _new_volume(platform: Platform, after: dsl.PipelineTask) -> Any:  # noqa: ANN401 - KFP's channel
    assert platform.shared is not None
    assert platform.shared.create is not None
    new = platform.shared.create
    made = kubernetes.CreatePVC(
        pvc_name_suffix="-flagscale",
        access_modes=list(new.access_modes),
        size=new.size,
        storage_class_name=new.storage_class,
    )
    made.set_display_name("Create volume")
    made.after(after)
    made.set_caching_options(enable_caching=False)
    return made.outputs["name"]
