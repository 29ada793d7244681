"""Steps in containers of this machine: `python -m pipelines run RECIPE --image IMAGE`.

The same local run, except that KFP's DockerRunner starts each step from an image, through the
Docker or podman socket that `DOCKER_HOST` names. A step gets what it gets on a cluster: a user
that is not root, a read-only root, no capabilities, an empty /tmp, and of this machine only the
folder of the runs and, read-only, the recipe's local files. It shares this machine's process
numbers, so that signals, notes and checks of who is alive are those of any local run. It gets no
GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kfp import local
from kfp.dsl.base_component import BaseComponent

from flagscale.errors import UserError
from flagscale.execution.notes import FOLDER_VARIABLE
from flagscale.processes import this_process
from flagscale.recipe import Recipe
from pipelines.local.recipe_files import check_readable, local_files
from pipelines.local.step_cache import Observer
from pipelines.local.stopping import Stopper
from pipelines.outcome import StepGone

logger = logging.getLogger(__name__)

SOURCES_LABEL = "flagscale.sources"  # set by `make images`: `source_version` of the code inside
_RUNNER_LABEL = "flagscale.runner"
_NOT_ROOT = (1000, 1000)  # the image's user, where the caller is root
_SHARED_MEMORY = "2g"
_PASSED = ("FLAGSCALE_", "MLFLOW_", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_", "AWS_", "OMP_")
_PASSED_NAMES = ("PYTHONUNBUFFERED", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY")


class Containers:
    """Runs the steps of a pipeline from an image.

    Args:
        image: its name, as for `docker run`.
        sources: `source_version` of the code here, which must be that of the image.
        recipe: its local files are mounted.
        runs: folder of all runs.

    Attributes:
        image: the name by which the engine lists it.
        identity: of its content.
        runner: for `kfp.local.init`.

    Raises:
        UserError: there is no engine or no such image, it holds other code, or a file of the
            recipe or MLflow's cannot be had there.
    """

    def __init__(self, image: str, sources: str, recipe: Recipe, runs: Path) -> None:
        _check_tracking(runs)
        self._client = _connect()
        self.image, self.identity = _find(self._client, image, sources)
        self._runs = runs.absolute()
        self._user = (os.getuid(), os.getgid()) if os.getuid() else _NOT_ROOT
        self._unfinished = False
        files = sorted(local_files(recipe))
        if os.getuid() == 0:
            check_readable(files, _NOT_ROOT[0])
        self.runner = local.DockerRunner(**self._options(files))

    @contextmanager
    def watch(
        self, pipeline: BaseComponent, steps: Observer, stopper: Stopper
    ) -> Iterator[Observer]:
        """Let a pipeline's steps run from the image; afterwards no container is left.

        Args:
            pipeline: its tasks get the image.
            steps: told of each step by the observer that this yields.
            stopper: where it kills processes, containers end too.
        """
        self._adapt(pipeline)
        stopper.kill_more = self.kill
        try:
            with gone_is_not_found():
                yield _Observing(self, steps)
        finally:
            self.kill()
            stopper.kill_more = lambda: None
            self._client.close()

    def _adapt(self, pipeline: BaseComponent) -> None:
        self._own(self._runs, self._runs / "artifacts")
        for name in ("checkpoints", "mlartifacts"):
            self._own(self._runs / name, *(self._runs / name).rglob("*"))
        self._own(*self._runs.glob("mlflow.db*"))
        for executor in pipeline.pipeline_spec.deployment_spec["executors"].values():
            executor["container"]["image"] = self.image

    def prepare(self) -> None:
        """Before a step: the variables that it gets, its notes' folder writable."""
        self.runner.container_run_args["environment"] = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_PASSED) or name.upper() in _PASSED_NAMES
        }
        self._own(Path(os.environ[FOLDER_VARIABLE]))

    def note_end(self, outputs: Mapping[str, Path]) -> bool:
        """Whether a step that KFP takes for ended well has ended well.

        The engine may have removed a container before KFP asks for its exit code; KFP then
        supposes 0. KFP's executor, inside, writes its output file last; without it a step has no
        outputs.
        """
        folders = {path.parent for path in outputs.values()}
        if folders and all((folder / "executor_output.json").exists() for folder in folders):
            return True
        self._unfinished = True
        return False

    def run(self, pipeline: BaseComponent, arguments: Mapping[str, Any]) -> None:
        """Run a pipeline.

        Raises:
            RuntimeError: a step failed, whatever KFP made of it.
        """
        try:
            pipeline(**arguments)
        finally:  # an error that KFP met further on has its cause here
            self.check()

    def check(self) -> None:
        """Raise as KFP does if a step has not ended well after all.

        Raises:
            RuntimeError: it has not.
        """
        if self._unfinished:
            raise StepGone

    def kill(self) -> None:
        """Remove what is left of this runner's containers."""
        mine = {"label": f"{_RUNNER_LABEL}={this_process()}"}
        for container in self._client.containers.list(all=True, filters=mine, ignore_removed=True):
            try:
                container.remove(force=True)
            except Exception as error:  # it has just ended by itself
                logger.debug("container %s: %s", container.short_id, error)

    def _own(self, *paths: Path) -> None:
        """Give folders to the containers' user, who else could not write there."""
        if os.getuid() == 0:
            for path in paths:
                if not path.is_symlink():
                    path.mkdir(parents=True, exist_ok=True) if not path.exists() else None
                    os.chown(path, *self._user)

    def _options(self, files: Iterable[str]) -> dict[str, Any]:
        from docker.types import Mount

        mounts = [Mount(str(self._runs), str(self._runs), type="bind")]
        mounts += [Mount(p, p, type="bind", read_only=True) for p in files]
        return {
            "user": "{}:{}".format(*self._user),
            "read_only": True,
            "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"},  # noqa: S108 - the container's
            "shm_size": _SHARED_MEMORY,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "pid_mode": "host",
            "network_mode": "host",
            "mounts": mounts,
            "working_dir": os.getcwd(),  # the recipe's paths may be relative
            "labels": {_RUNNER_LABEL: this_process()},
        }


class _Observing:
    """Tells another observer, and prepares containers in between."""

    def __init__(self, containers: Containers, steps: Observer) -> None:
        self._containers = containers
        self._steps = steps

    def started(self, name: str) -> None:
        self._containers.check()
        self._steps.started(name)
        self._containers.prepare()

    def reused(self, name: str, outputs: Mapping[str, Path]) -> None:
        self._containers.check()
        self._steps.reused(name, outputs)

    def finished(self, name: str, outputs: Mapping[str, Path], gave_values: bool) -> None:
        if gave_values or self._containers.note_end(outputs):
            self._steps.finished(name, outputs, gave_values)


def _connect() -> Any:  # noqa: ANN401 - docker's client
    import docker

    try:
        client = docker.from_env()
        security = client.info().get("SecurityOptions") or []
    except docker.errors.DockerException as error:
        host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        raise UserError(
            f"DOCKER_HOST={host}: no container engine answers there ({error}); start docker, or "
            "`podman system service --time 0 unix:///run/podman.sock` and name that socket"
        ) from error
    if any("rootless" in option for option in security):
        client.close()
        raise UserError(
            "DOCKER_HOST: a rootless engine gives its users other numbers, so that steps could not "
            "write into the folder of runs; name the socket of one that root runs"
        )
    return client


def _check_tracking(runs: Path) -> None:
    """A file that a container does not see would be another, and be gone with the container."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    for scheme in ("sqlite:///", "file://"):
        place = Path(os.path.abspath(uri.removeprefix(scheme)))
        if uri.startswith(scheme) and not place.is_relative_to(runs.absolute()):
            raise UserError(
                f"MLFLOW_TRACKING_URI={uri}: with --image the steps see no files but those of the "
                f"folder of runs ({runs}); unset it to track there, or name a server"
            )


@contextmanager
def gone_is_not_found() -> Iterator[None]:
    """Inside, a container that podman is removing is one that is not there.

    KFP asks for the log of a container that a fast step may have ended already, and minds no 404.
    Podman's answer is 500, with the reason in words. Then KFP asks for the exit code: of one that
    goes meanwhile podman says -1, which KFP takes for the step's, and has the reason beside it.
    """
    from docker.api import client
    from docker.errors import APIError, NotFound
    from docker.models.containers import Container

    make_error, wait = client.create_api_error_from_http_exception, Container.wait

    def make(error: Any) -> None:  # noqa: ANN401 - an HTTPError of requests
        try:
            make_error(error)
        except APIError as told:
            if "no such container" in str(told.explanation):
                raise NotFound(str(error), told.response, told.explanation) from error
            raise

    def wait_for(container: Container, **options: Any) -> Any:  # noqa: ANN401 - the engine's answer
        answer = wait(container, **options)
        if answer.get("Error"):  # the code is not the container's
            raise NotFound(answer["Error"]["Message"])
        return answer

    client.create_api_error_from_http_exception, Container.wait = make, wait_for
    try:
        yield
    finally:
        client.create_api_error_from_http_exception, Container.wait = make_error, wait


def _find(client: Any, name: str, sources: str) -> tuple[str, str]:  # noqa: ANN401
    """The name by which the engine lists an image, and the digest of its content."""
    import docker

    try:
        found = client.images.get(name)
    except docker.errors.ImageNotFound as error:
        raise UserError(f"--image {name}: no such image; build it with `make images`") from error
    inside = found.labels.get(SOURCES_LABEL)
    if inside != sources:
        raise UserError(
            f"--image {name}: it holds {inside or 'no code of this project'}, and the code here is "
            f"{sources}; renew it with `make images`"
        )
    names = [*found.tags, *(found.attrs.get("RepoDigests") or [])]
    if not names:
        raise UserError(f"--image {name}: the image has no name; give it one with `podman tag`")
    # podman puts its own registry, localhost/, before names without one.
    listed = [n for n in names if n == name or n.endswith(f"/{name}")]
    return (listed or names)[0], str(found.id)
