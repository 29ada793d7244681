"""KFP's local cache, made careful, and the place where the runner learns what happens.

KFP reuses a step's outputs whenever their paths still exist. Here an output is also checked: an
artifact whose files are missing or changed since it was written is made anew. KFP asks the cache
before each step and fills it after, so that is also where a runner can hear of steps.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kfp import dsl, local
from kfp.local import cache as kfp_cache

from flagscale.artifacts import MANIFEST, open_artifact
from flagscale.errors import UserError
from flagscale.execution.absent import absent, is_empty, reason
from flagscale.shared import damage, read_pointer

logger = logging.getLogger(__name__)

# Acts on MLflow's registry, where other runs may have acted since; on a cluster it is not cached.
_NEVER_REUSED = ("promote",)


class Observer(Protocol):
    """Told of each step, in order."""

    def started(self, name: str) -> None:
        """The step begins its work; what this raises ends the pipeline."""

    def reused(self, name: str, outputs: Mapping[str, Path]) -> None:
        """The step's earlier outputs serve again."""

    def finished(self, name: str, outputs: Mapping[str, Path], gave_values: bool) -> None:
        """The step has ended well; `outputs` are its artifacts' paths.

        `gave_values`: there are other outputs too, which one that died unseen has not.
        """


class StepCache(kfp_cache.LocalCache):
    """A cache that checks what it hands out.

    Args:
        cache_root: folder of the entries.
        observer: told of each step.
        reuse: False to repeat every step (its outputs are kept for later runs all the same).
    """

    def __init__(self, cache_root: str, observer: Observer, reuse: bool) -> None:
        super().__init__(cache_root)
        self._observer = observer
        self._reuse = reuse
        self._names: dict[str, str] = {}
        self._unnoted: Exception | None = None

    def compute_key(self, component_name: str, *args: Any, **options: Any) -> str:  # noqa: ANN401
        """KFP's own key; remembers which step it belongs to."""
        key = super().compute_key(component_name, *args, **options)
        self._names[key] = component_name.removeprefix("comp-")
        return key

    def get(self, key: str) -> dict[str, Any] | None:
        """Outputs of an earlier, equal step if they are still what it wrote; else None."""
        self.check()
        name = self._names[key]
        reuse = self._reuse and name not in _NEVER_REUSED
        outputs = super().get(key) if reuse else None
        problem = next(filter(None, map(_damage, _paths(outputs or {}).values())), None)
        if outputs is None or problem:
            if problem:
                logger.warning("%s: not reusing the earlier result: %s", name, problem)
            self._observer.started(name)
            return None
        self._observer.reused(name, _paths(outputs))
        return outputs

    def put(self, key: str, outputs: dict[str, Any]) -> None:
        """Keep the outputs of a step that ended well; one without any may have died unseen."""
        if outputs:
            super().put(key, outputs)
        paths = _paths(outputs)
        try:
            self._observer.finished(self._names[key], paths, len(outputs) > len(paths))
        except Exception as error:
            self._unnoted = error  # KFP takes it for the cache's, and goes on
            raise

    def check(self) -> None:
        """Raise what `finished` has raised."""
        if self._unnoted is not None:
            raise self._unnoted


@contextmanager
def kfp_local(
    pipeline_root: Path,
    cache_root: Path,
    observer: Observer,
    reuse: bool,
    runner: local.DockerRunner | None = None,
) -> Iterator[None]:
    """Make KFP run pipelines on this machine, with a `StepCache`; None: steps as processes."""
    # No workspace_root: KFP deletes that folder after each pipeline, so it gets a temporary one.
    local.init(
        runner or local.SubprocessRunner(use_venv=False),
        pipeline_root=str(pipeline_root),
        raise_on_error=True,
        enable_caching=True,
        cache_root=str(cache_root),
    )
    # KFP has no setting for the cache's class; the version is pinned and a test runs this.
    cache = StepCache(str(cache_root), observer, reuse)
    kfp_cache._cache_singleton = cache
    # By KFP's own spelling of the path: under another one it would use a cache of its own making,
    # and nobody would be told of any step.
    kfp_cache._cache_singleton_root = local.config.LocalExecutionConfig.instance.cache_root
    try:
        yield
        cache.check()  # of the last step
    finally:
        kfp_cache.reset_local_cache_singleton()
        local.config.LocalExecutionConfig.instance = None


def _paths(outputs: Mapping[str, Any]) -> dict[str, Path]:
    return {n: Path(v.uri) for n, v in outputs.items() if isinstance(v, dsl.Artifact)}


def _damage(path: Path) -> str | None:
    """What is wrong with an output, None if nothing."""
    manifest = path / MANIFEST
    try:
        pointer = read_pointer(path)
        if pointer is not None:
            return damage(pointer)
        if path.is_dir():
            failed = absent(path)
            if failed is not None and not is_empty(failed):
                return f"there was none: {reason(failed)}"
            open_artifact(path, json.loads(manifest.read_text(encoding="utf-8"))["kind"])
        elif path.stat().st_size == 0:
            return f"{path} is empty"
    except (UserError, OSError, ValueError, KeyError) as error:
        return str(error)
    return None
