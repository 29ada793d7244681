"""A run in MLflow that never stops the work that it is about."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import Interrupted
from flagscale.secrets import mask
from flagscale.tracking.delivery import Patience
from flagscale.tracking.inputs import Split, send_inputs
from flagscale.tracking.letters import Begun, Point
from flagscale.tracking.models import (
    Model,
    model_of_artifact,
    register,
    send_figures,
    send_kept,
    send_model,
)
from flagscale.tracking.names import (
    MISSING_TAG,
    NOTE_TAG,
    RESUMED_TAG,
    flatten,
    metric_name,
    parameter,
    tag,
)
from flagscale.tracking.outbox import Outbox
from flagscale.tracking.server import UPLOAD_TIMEOUT, environment, send_params

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flagscale.tracking.kfp_run import KfpRun

logger = logging.getLogger(__name__)

_LEAST_SECONDS = 2.0  # that a server which serves is given
_LAST_SECONDS = {"FAILED": 30.0, "KILLED": 10.0}  # twice; a pod that is stopped has 30


class StepRun:
    """One run in MLflow, or nothing at all when tracking is off. No method raises for MLflow.

    Nor does one keep the work waiting for longer than a second, but the uploads, which go on until
    they succeed or the process's patience with the server is spent (`delivery.Patience`), and
    `finish`. What was given up is told in the run's tag `flagscale.missing` and its description.

    Attributes:
        status: RUNNING until `finish`.
    """

    def __init__(self, outbox: Outbox | None) -> None:
        """Take hold of a run.

        Args:
            outbox: None when tracking is off.
        """
        self.status = "RUNNING"
        self._outbox = outbox
        self._description = ""

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None when tracking is off, or the server has not made the run yet."""
        return self.begun.run_id if self.begun else None

    @property
    def begun(self) -> Begun | None:
        """What the server said when it made the run; None where `run_id` is."""
        return None if self._outbox is None else self._outbox.begun

    @property
    def is_tracked(self) -> bool:
        """Whether there is somebody to tell, now or later."""
        return self._outbox is not None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> list[Point]:
        """Record figures. Returns at once: they are sent every few seconds.

        Args:
            metrics: name -> value; characters that MLflow refuses in names are replaced.
            step: optimiser step, of which a run keeps one value; None for figures that describe
                the whole run.

        Returns:
            The figures as they are told; those of a model are told once more, of the model.
        """
        points = _points(metrics, step)
        if self._outbox is not None:
            self._outbox.put_points(points)
        return points

    def log_headline(self, metrics: Mapping[str, float]) -> list[Point]:
        """Record the figures that pipeline runs are compared by, with the pipeline's run too.

        That shows the last that any step gave it. Where somebody else made it, it is for them.
        """
        points = self.log_metrics(metrics)
        self._of_parent(lambda parent, _: parent.log_headline(metrics))
        return points

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; nested ones are flattened to `a.b.c`, long values are cut."""
        flat = {metric_name(name): parameter(value) for name, value in flatten(params).items()}
        self._tell("parameters", lambda client, begun: send_params(client, begun.run_id, flat))

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

        def send(client: MlflowClient, begun: Begun) -> None:
            with environment(UPLOAD_TIMEOUT):
                if path.is_dir():
                    client.log_artifacts(begun.run_id, str(path), artifact_path)
                else:
                    client.log_artifact(begun.run_id, str(path), artifact_path)

        self._now(path.name, send)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Store a text as the file `artifact_file` with the run."""
        shown = mask(text)
        self._now(
            artifact_file,
            lambda client, begun: client.log_text(begun.run_id, shown, artifact_file),
        )

    def set_tag(self, key: str, value: object) -> None:
        """Set a tag."""
        text = tag(value)
        self._tell("tags", lambda client, begun: client.set_tag(begun.run_id, key, text))

    def describe(self, text: str, *, pipeline: bool = False) -> None:
        """Set the run's description, which MLflow shows above everything else.

        Args:
            text: Markdown; empty: none.
            pipeline: it is that of the pipeline's run too, unless somebody else made that.
        """
        if not text:
            return
        self._description = text
        self.set_tag(NOTE_TAG, text)
        if pipeline:
            self._of_parent(lambda parent, _: parent.describe(text))

    def log_inputs(self, splits: Sequence[Split], contexts: Sequence[str]) -> None:
        """Say which splits the work reads.

        Args:
            splits: which.
            contexts: for what, one for each: e.g. training.
        """
        self._tell(
            "inputs", lambda client, begun: send_inputs(client, begun.run_id, splits, contexts)
        )

    def log_weights(self, model: Model) -> None:
        """Record weights that the work has made, and leave them where they are."""
        self._tell("a model", lambda client, begun: send_model(client, begun, model))

    def keep_checkpoints(self, checkpoints: Sequence[Model]) -> None:
        """Record which checkpoints of a training there are now. Returns at once."""
        self._tell(
            "checkpoints", lambda client, begun: send_kept(client, begun, checkpoints), glance=False
        )

    def log_figures_of(
        self, digest: str, points: Sequence[Point], split: Split | None = None
    ) -> None:
        """Say which model figures of this run are of; nothing if no run has recorded the model.

        Args:
            digest: of the artifact that the model is.
            points: of `log_metrics`.
            split: what they were measured on; None if that is no split.
        """

        def send(client: MlflowClient, begun: Begun) -> None:
            model_id = model_of_artifact(client, begun.experiment_id, digest)
            if model_id is not None:
                send_figures(client, begun, model_id, points, split)

        self._tell("figures of a model", send)

    def log_model(
        self, folder: str | Path, registered_model_name: str, model: Model | None = None
    ) -> str | None:
        """Store a Hugging Face folder as a model, register it, and make it the candidate.

        Weights of more than 1 GB stay where they are; the model says where.

        Args:
            folder: what `AutoModelForCausalLM.from_pretrained` loads.
            registered_model_name: name in the model registry.
            model: what MLflow shows of it.

        Returns:
            `models:/<name>/<version>`; `mlflow.artifacts.download_artifacts` of it gives the folder
            back. None when tracking is off or failed.
        """
        folder = Path(folder)
        shown = model or Model("exported", 0, str(folder.absolute()))

        def send(client: MlflowClient, begun: Begun) -> str:
            with environment(UPLOAD_TIMEOUT):
                return register(client, begun, folder, registered_model_name, shown)

        uri: str | None = self._now("the model", send)
        return uri

    def mark_resumed(self) -> None:
        """Say which run did the first part of the work, if another one did."""

        def send(client: MlflowClient, begun: Begun) -> None:
            if begun.resumes is not None:
                client.set_tag(begun.run_id, RESUMED_TAG, begun.resumes)

        self._tell("tags", send)

    def finish(self, status: str) -> None:
        """Send what is left and set the final status: FINISHED, FAILED or KILLED.

        Waits for a server that is away as long as the process has patience; after a failure or a
        signal for seconds.
        """
        self.status = status
        if self._outbox is None:
            return
        seconds = min(Patience.left, _LAST_SECONDS.get(status, Patience.left))
        seconds = max(seconds, _LEAST_SECONDS)
        self._outbox.drain(seconds)  # first: who reads FINISHED finds all figures
        lost = self._outbox.lost
        if lost:
            self.set_tag(MISSING_TAG, lost)
            note = f"{self._description}\n\n**Missing here**, MLflow did not take it: {lost}"
            self.set_tag(NOTE_TAG, note.strip())
        self._tell("the status", lambda client, begun: client.set_terminated(begun.run_id, status))
        self._of_parent(lambda parent, run_id: parent.settle(run_id))
        if not self._outbox.drain(seconds):
            logger.error("MLflow was not told, and never will be: %s", self._outbox.left)
            self._outbox.give_up()

    def _tell(
        self, kind: str, send: Callable[[MlflowClient, Begun], object], *, glance: bool = True
    ) -> None:
        """Tell the server something small, when it serves; in the order of the calls."""
        if self._outbox is not None:
            self._outbox.put(kind, send, glance=glance)

    def _of_parent(self, tell: Callable[[KfpRun, str], object]) -> None:
        """Tell the run above, which is given this one's id; not where somebody else made it."""

        def send(_: MlflowClient, begun: Begun) -> None:
            if begun.parent is not None:
                tell(begun.parent, begun.run_id)

        self._tell("the pipeline's run", send)

    def _now(self, kind: str, send: Callable[[MlflowClient, Begun], Any]) -> Any:  # noqa: ANN401
        """Tell, or ask, the server something that cannot wait; None where that was given up."""
        return None if self._outbox is None else self._outbox.attempt(kind, send)


def _points(metrics: Mapping[str, float], step: int | None) -> list[Point]:
    now = int(time.time() * 1000)
    return [Point(metric_name(name), float(value), now, step) for name, value in metrics.items()]


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
