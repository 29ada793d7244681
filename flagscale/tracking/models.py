"""Models in MLflow: the checkpoints that a training keeps, its student, what is exported of it.

A `LoggedModel` is known by its run and name, or by the digest of the artifact that it is. Weights
of more than 1 GB stay where they are, and the model says where: MLflow's own upload of such files
is slow, and a second copy of tens of gigabytes serves nobody.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.artifacts import MANIFEST, hash_files, write_json
from flagscale.tracking.letters import Begun, Point
from flagscale.tracking.names import parameter, tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flagscale.tracking.inputs import Split

ARTIFACT_TAG = "flagscale.artifact"  # digest of the artifact that the model is
WEIGHTS_TAG = "flagscale.weights"  # where they are
WEIGHTS = "weights.json"  # where they are, file by file

_CANDIDATE = "candidate"
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
    """

    name: str
    step: int
    weights: str
    digest: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    points: Sequence[Point] = ()
    split: Split | None = None


def send_model(client: MlflowClient, begun: Begun, model: Model) -> str:
    """Make the `LoggedModel`, or find it where an earlier attempt has; give its id."""
    from mlflow.entities import LoggedModelOutput

    found = find_model(client, begun, model.name)
    if found is None:
        tags = {WEIGHTS_TAG: tag(model.weights)}
        if model.digest is not None:
            tags[ARTIFACT_TAG] = model.digest
        params = {"step": str(model.step)}
        params |= {name: parameter(str(value)) for name, value in model.params.items()}
        found = client.create_logged_model(
            begun.experiment_id,
            name=_model_name(model.name),
            source_run_id=begun.run_id,
            tags=tags,
            params=params,
            model_type="causal-lm",
        ).model_id
    client.finalize_logged_model(found, "READY")
    told = client.get_run(begun.run_id).outputs
    if found not in {output.model_id for output in (told.model_outputs if told else ())}:
        client.log_outputs(begun.run_id, [LoggedModelOutput(found, model.step)])
    send_figures(client, begun, found, model.points, model.split)
    return str(found)


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


def find_model(client: MlflowClient, begun: Begun, name: str) -> str | None:
    """Id of the run's model of that name."""
    query = f"source_run_id = '{begun.run_id}' AND name = '{_model_name(name)}'"
    found = client.search_logged_models([begun.experiment_id], query, max_results=1)
    return str(found[0].model_id) if found else None


def model_of_artifact(client: MlflowClient, experiment_id: str, digest: str) -> str | None:
    """Id of the newest model that is this artifact."""
    query = f"tags.`{ARTIFACT_TAG}` = '{digest}'"
    newest_first = [{"field_name": "creation_time", "ascending": False}]
    found = client.search_logged_models(
        [experiment_id], query, max_results=1, order_by=newest_first
    )
    return str(found[0].model_id) if found else None


def forget_model(client: MlflowClient, begun: Begun, name: str) -> None:
    """Delete the run's model of that name, whose weights are gone."""
    found = find_model(client, begun, name)
    if found is not None:
        client.delete_logged_model(found)


def register(
    client: MlflowClient, begun: Begun, folder: Path, registered_name: str, model: Model
) -> str:
    """Store a folder as a model and as the next version of a registered one, the candidate.

    Args:
        client: of the tracking server.
        begun: the run.
        folder: of the model's files.
        registered_name: in the registry.
        model: what it says.

    Returns:
        `models:/<name>/<version>`.
    """
    from mlflow.exceptions import MlflowException

    model_id = send_model(client, begun, model)
    _upload(client, model_id, folder, model)
    try:
        client.create_registered_model(registered_name)
    except MlflowException:  # there is one: this becomes its next version
        client.get_registered_model(registered_name)
    query = f"name = '{registered_name}' and run_id = '{begun.run_id}'"
    made = client.search_model_versions(query)  # by an attempt whose answer got lost
    version = (
        made[0].version
        if made
        else client.create_model_version(
            registered_name,
            f"models:/{model_id}",
            begun.run_id,
            tags={WEIGHTS_TAG: tag(model.weights)},
            await_creation_for=0,
            model_id=model_id,
        ).version
    )
    client.set_registered_model_alias(registered_name, _CANDIDATE, version)
    return f"models:/{registered_name}/{version}"


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
