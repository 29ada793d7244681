"""Models in MLflow: the checkpoints that a training keeps, its student, what is exported of it.

A `LoggedModel` is known by its run and name, or by the digest of the artifact that it is. Weights
of more than 1 GB stay where they are, and the model says where: MLflow's own upload of such files
is slow, and a second copy of tens of gigabytes serves nobody.
"""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.artifacts import MANIFEST, hash_files, write_json
from flagscale.tracking.letters import Begun, Point
from flagscale.tracking.names import ATTEMPT_TAG, parameter, tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flagscale.tracking.inputs import Split

ARTIFACT_TAG = "flagscale.artifact"  # digest of the artifact that the model is
CHECKPOINT_TAG = "flagscale.checkpoint"
WEIGHTS_TAG = "flagscale.weights"  # where they are
WEIGHTS = "weights.json"  # where they are, file by file

_CANDIDATE = "candidate"
_CARD = "README.md"
_LONGEST_DESCRIPTION = 5000  # characters, in MLflow's databases
_MOST_BYTES_UPLOADED = 10**9
_SMALL = 50 * 10**6  # bytes of a file that goes along with a pointer


@dataclass(frozen=True)
class Model:
    """What a `LoggedModel` says.

    Attributes:
        name: unique within its run.
        step: of the optimiser, whose weights these are.
        weights: where they are, in words, for as long as they are there.
        digest: of the artifact that the model is, if it is one.
        params: what else is fixed.
        points: figures.
        split: what the figures are of.
        is_checkpoint: it is one of a training, to go on from.
        attempt: of the call that makes it, for its further attempts.
    """

    name: str
    step: int
    weights: str
    digest: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    points: Sequence[Point] = ()
    split: Split | None = None
    is_checkpoint: bool = False
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)


def send_model(client: MlflowClient, begun: Begun, model: Model) -> None:
    """Make the `LoggedModel`, unless the run has one of that name from an earlier attempt."""
    found = find_model(client, begun, model.name)
    if found is None or found.tags.get(ATTEMPT_TAG) == model.attempt:
        _complete(client, begun, model, found or _make(client, begun, model))


def _complete(client: MlflowClient, begun: Begun, model: Model, made: Any) -> None:  # noqa: ANN401
    """What makes a `LoggedModel` whole; may be told several times."""
    from mlflow.entities import LoggedModelOutput

    client.finalize_logged_model(made.model_id, "READY")
    told = client.get_run(begun.run_id).outputs
    if made.model_id not in {output.model_id for output in (told.model_outputs if told else ())}:
        client.log_outputs(begun.run_id, [LoggedModelOutput(made.model_id, model.step)])
    send_figures(client, begun, made.model_id, model.points, model.split)


def _make(client: MlflowClient, begun: Begun, model: Model) -> Any:  # noqa: ANN401 - a LoggedModel
    tags = {WEIGHTS_TAG: tag(model.weights), ATTEMPT_TAG: model.attempt}
    if model.digest is not None:
        tags[ARTIFACT_TAG] = model.digest
    if model.is_checkpoint:
        tags[CHECKPOINT_TAG] = "true"
    params = {"step": str(model.step)}
    params |= {name: parameter(str(value)) for name, value in model.params.items()}
    return client.create_logged_model(
        begun.experiment_id,
        name=_model_name(model.name),
        source_run_id=begun.run_id,
        tags=tags,
        params=params,
        model_type="causal-lm",
    )


def send_figures(
    client: MlflowClient,
    begun: Begun,
    model_id: str,
    points: Sequence[Point],
    split: Split | None,
) -> None:
    """Figures of a model, measured on a split; the run has them too, once."""
    from mlflow.entities import Metric

    metrics = [
        Metric(
            point.name,
            point.value,
            point.time,
            point.step or 0,
            model_id=model_id,
            dataset_name=split.name if split else None,
            dataset_digest=split.digest if split else None,
            run_id=begun.run_id,
        )
        for point in points
    ]
    if metrics:
        client.log_batch(begun.run_id, metrics=metrics)


def find_model(client: MlflowClient, begun: Begun, name: str) -> Any:  # noqa: ANN401
    """The run's model of that name, None if it has none."""
    query = f"source_run_id = '{begun.run_id}' AND name = '{_model_name(name)}'"
    found = client.search_logged_models([begun.experiment_id], query, max_results=1)
    return found[0] if found else None


def model_of_artifact(client: MlflowClient, experiment_id: str, digest: str) -> str | None:
    """Id of the newest model that is this artifact."""
    query = f"tags.`{ARTIFACT_TAG}` = '{digest}'"
    newest_first = [{"field_name": "creation_time", "ascending": False}]
    found = client.search_logged_models(
        [experiment_id], query, max_results=1, order_by=newest_first
    )
    return str(found[0].model_id) if found else None


def send_kept(client: MlflowClient, begun: Begun, checkpoints: Sequence[Model]) -> None:
    """Make the run's checkpoints these, whatever an earlier attempt at the work has left."""
    for model in checkpoints:
        send_model(client, begun, model)
    names = {model.name for model in checkpoints}
    query = f"source_run_id = '{begun.run_id}' AND tags.`{CHECKPOINT_TAG}` = 'true'"
    for one in client.search_logged_models([begun.experiment_id], query):
        if one.name not in names:
            client.delete_logged_model(one.model_id)


def register(
    client: MlflowClient, begun: Begun, folder: Path, registered_name: str, model: Model
) -> str:
    """Store a folder as a model and as the next version of a registered one, the candidate.

    Args:
        client: of the tracking server.
        begun: the run.
        folder: of the model's files; its model card becomes the version's description.
        registered_name: in the registry.
        model: what it says.

    Returns:
        `models:/<name>/<version>`.
    """
    from mlflow.exceptions import MlflowException

    query = f"source_run_id = '{begun.run_id}' AND tags.`{ATTEMPT_TAG}` = '{model.attempt}'"
    found = client.search_logged_models([begun.experiment_id], query)
    made = found[0] if found else _make(client, begun, model)
    _upload(client, made.model_id, folder, model)
    _complete(client, begun, model, made)
    try:
        client.create_registered_model(registered_name)
    except MlflowException:  # there is one: this becomes its next version
        client.get_registered_model(registered_name)
    version = _version(client, begun, registered_name, made.model_id, model, _card(folder))
    client.set_registered_model_alias(registered_name, _CANDIDATE, version)
    return f"models:/{registered_name}/{version}"


def _card(folder: Path) -> str | None:
    """The model card's text, without what it says to the Hugging Face hub; None: it has none."""
    card = folder / _CARD
    if not card.exists():
        return None
    text = re.sub(r"\A---\n.*?^---\n+", "", card.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return text if len(text) <= _LONGEST_DESCRIPTION else f"{text[: _LONGEST_DESCRIPTION - 1]}…"


def _version(
    client: MlflowClient,
    begun: Begun,
    name: str,
    model_id: str,
    model: Model,
    description: str | None,
) -> str:
    """Of a registered model: a new one, unless an answer got lost."""
    of_run = client.search_model_versions(f"name = '{name}' and run_id = '{begun.run_id}'")
    for one in of_run:
        if one.tags.get(ATTEMPT_TAG) == model.attempt:
            return str(one.version)
    tags = {WEIGHTS_TAG: tag(model.weights), ATTEMPT_TAG: model.attempt}
    made = client.create_model_version(
        name,
        f"models:/{model_id}",
        begun.run_id,
        tags=tags,
        description=description,
        await_creation_for=0,
        model_id=model_id,
    )
    return str(made.version)


def is_pointer(folder: Path) -> bool:
    """Whether the weights of a folder are too large to be stored a second time."""
    return sum(path.stat().st_size for path in _files(folder)) > _MOST_BYTES_UPLOADED


def _upload(client: MlflowClient, model_id: str, folder: Path, model: Model) -> None:
    if not is_pointer(folder):
        client.log_model_artifacts(model_id, str(folder))
        return
    large = [path for path in _files(folder) if path.stat().st_size > _SMALL]
    with tempfile.TemporaryDirectory(prefix="flagscale-pointer-") as name:
        small = Path(name)
        for path in _files(folder):
            target = small / path.relative_to(folder)
            if path not in large:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path.absolute())
        hashes = _hashes(folder)
        files = {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "hash": hashes.get(path.relative_to(folder).as_posix()),
            }
            for path in large
        }
        write_json(small / WEIGHTS, {"weights": model.weights, "files": files})
        client.log_model_artifacts(model_id, str(small))


def _hashes(folder: Path) -> dict[str, str]:
    """Of an artifact's files, from its manifest."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return hash_files(folder)
    found: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _model_name(name: str) -> str:
    """Without what MLflow refuses in the names of models."""
    return re.sub(r"[/:.%\"']", "_", name)
