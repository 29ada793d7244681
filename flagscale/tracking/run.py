"""A run in MLflow that never stops the work that it is about."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import Interrupted
from flagscale.secrets import mask
from flagscale.tracking.names import RESUMED_TAG, first_line, flatten, metric_name, parameter, tag
from flagscale.tracking.server import (
    UPLOAD_TIMEOUT,
    environment,
    send_metrics,
    send_model,
    send_params,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0
_PAUSE_SECONDS = 60.0  # after a failure: leave a broken server alone, and do not stall the step
_MOST_BUFFERED = 100_000
_METRICS_A_BATCH = 500


class StepRun:
    """One run in MLflow, or nothing at all when tracking is off. No method raises for MLflow.

    Attributes:
        run_id: MLflow's id; None when tracking is off.
        resumes: the run that did the first part of this work; None where there is none.
        status: RUNNING until `finish`.
    """

    def __init__(
        self,
        client: MlflowClient | None,
        run_id: str | None,
        known: Mapping[str, set[int]] | None = None,
    ) -> None:
        """Take hold of a run.

        Args:
            client: None when tracking is off.
            run_id: None when tracking is off.
            known: name of a metric -> steps that the run has already, which are not sent again.
        """
        self.run_id = run_id
        self.resumes: str | None = None
        self.status = "RUNNING"
        self._client = client
        self._known = known or {}
        self._buffer: list[tuple[str, float, int, int]] = []
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._paused_until = 0.0
        self._closing = threading.Event()
        self._flusher: threading.Thread | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record figures. Returns at once: they are sent about once a second.

        Args:
            metrics: name -> value; characters that MLflow refuses in names are replaced.
            step: optimiser step; None for figures that describe the whole run.
        """
        if self._client is None:
            return
        now = int(time.time() * 1000)
        named = {metric_name(name): float(value) for name, value in metrics.items()}
        with self._lock:
            for name, value in named.items():
                if step is None or step not in self._known.get(name, ()):
                    self._buffer.append((name, value, now, step or 0))
            too_many = len(self._buffer) > _MOST_BUFFERED
            del self._buffer[:-_MOST_BUFFERED]
        if too_many and "too many" not in self._warned:
            self._warned.add("too many")
            logger.warning("MLflow is behind by %d figures: the oldest are dropped", _MOST_BUFFERED)
        if self._flusher is None:
            self._flusher = threading.Thread(target=self._flush_often, daemon=True)
            self._flusher.start()

    def log_headline(self, metrics: Mapping[str, float]) -> None:
        """Record the figures that pipeline runs are compared by, with the pipeline's run too.

        Where somebody else made that run (the runner, KFP), it is for them to show them there.
        """
        self.log_metrics(metrics)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; nested ones are flattened to `a.b.c`, long values are cut."""
        flat = {metric_name(name): parameter(value) for name, value in flatten(params).items()}
        self._call("parameters", lambda client: send_params(client, self._id, flat))

    def log_manifest(self, path: Path) -> None:
        """Upload an artifact's manifest; the most memory that a process held becomes a figure.

        Args:
            path: of the manifest.
        """
        self.log_artifact(path)
        held = json.loads(path.read_text(encoding="utf-8"))["peak_memory"]
        peaks = {f"peak {place} memory GB": max(ranks) / 1e9 for place, ranks in held.items()}
        self.log_metrics(peaks)

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Store a file, or a folder's content, with the run (below `artifact_path`)."""
        path = Path(path)

        def send(client: MlflowClient) -> None:
            with environment(UPLOAD_TIMEOUT):
                if path.is_dir():
                    client.log_artifacts(self._id, str(path), artifact_path)
                else:
                    client.log_artifact(self._id, str(path), artifact_path)

        self._call("artifacts", send)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Store a text as the file `artifact_file` with the run."""
        shown = mask(text)
        self._call("artifacts", lambda client: client.log_text(self._id, shown, artifact_file))

    def set_tag(self, key: str, value: object) -> None:
        """Set a tag."""
        self._call("tags", lambda client: client.set_tag(self._id, key, tag(value)))

    def mark_resumed(self) -> None:
        """Say which run did the first part of the work, if another one did."""
        if self.resumes is not None:
            self.set_tag(RESUMED_TAG, self.resumes)

    def log_model(self, folder: str | Path, registered_model_name: str) -> str | None:
        """Store a Hugging Face folder as a model and register a new version of it.

        Args:
            folder: what `AutoModelForCausalLM.from_pretrained` loads.
            registered_model_name: name in the model registry.

        Returns:
            `models:/<name>/<version>`; `mlflow.artifacts.download_artifacts` of it gives the folder
            back. None when tracking is off or failed.
        """
        uris: list[str] = []

        def send(client: MlflowClient) -> None:
            with environment(UPLOAD_TIMEOUT):
                uris.append(send_model(client, self._id, Path(folder), registered_model_name))

        if self._client is not None:  # it was asked for by name: wait until the server may be back
            time.sleep(max(0.0, self._paused_until - time.monotonic()))
        self._call("the model", send)
        return uris[0] if uris else None

    def finish(self, status: str) -> None:
        """Send what is left and set the final status: FINISHED, FAILED or KILLED."""
        self.status = status
        self._closing.set()
        if self._flusher is not None:
            self._flusher.join(timeout=60)
        self._paused_until = 0.0
        self._flush()
        if self._buffer:  # the last chance: a moment's trouble costs no figures
            time.sleep(_FLUSH_SECONDS)
            self._paused_until = 0.0
            self._flush()
        self._call("the status", lambda client: client.set_terminated(self._id, status))

    @property
    def _id(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _flush_often(self) -> None:
        while not self._closing.wait(_FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        while self._buffer and time.monotonic() >= self._paused_until:
            with self._lock:
                batch = self._buffer[:_METRICS_A_BATCH]
            if not self._call("metrics", partial(send_metrics, run_id=self._id, batch=batch)):
                return  # kept, and sent again after the pause
            with self._lock:
                del self._buffer[: len(batch)]

    def _call(self, kind: str, send: Callable[[MlflowClient], object]) -> bool:
        """Talk to the server; on failure warn once a kind, then leave it alone for a while."""
        if self._client is None:
            return False
        if time.monotonic() < self._paused_until:  # figures wait, all else is lost: say so
            self._warn(kind, "it did not answer a moment ago")
            return False
        try:
            send(self._client)
        except Exception as error:  # whatever MLflow raises: training goes on
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            self._warn(kind, first_line(error))
            return False
        return True

    def _warn(self, kind: str, why: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("MLflow did not take %s, going on: %s", kind, why)


@contextmanager
def truthful_status(run: StepRun) -> Iterator[None]:
    """Finish the run with what became of the body."""
    try:
        yield
        run.finish("FINISHED")
    except (Interrupted, KeyboardInterrupt):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
