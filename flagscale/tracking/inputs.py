"""The splits of a data set as MLflow knows them: what a run read, and what its figures are of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flagscale.artifacts import Manifest
from flagscale.secrets import mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

SPLITS = ("train", "validation", "test")

_CONTEXT_TAG = "mlflow.data.context"
_LONGEST_DIGEST = 36  # characters
_LONGEST_TEXT = 60_000


@dataclass(frozen=True)
class Split:
    """One of them.

    Attributes:
        name: train, validation or test.
        digest: of the artifact that it is in.
        source: where the text came from.
        profile: counts.
    """

    name: str
    digest: str
    source: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the digest of any artifact: MLflow has room for less."""
        object.__setattr__(self, "digest", self.digest.removeprefix("sha256:")[:_LONGEST_DIGEST])

    @classmethod
    def of(cls, dataset: Manifest, name: str) -> Split:
        """A split of a `dataset` artifact."""
        data = dataset.recipe.get("data", {})
        source = {key: data[key] for key in ("source", "revision", "blend") if data.get(key)}
        profile = dataset.facts.get("splits", {}).get(name, {})
        return cls(name, dataset.digest, source, profile)


def send_inputs(
    client: MlflowClient, run_id: str, splits: Sequence[Split], contexts: Sequence[str]
) -> None:
    """Say what a run reads; what it has been told of already is not told again.

    Args:
        client: of the tracking server.
        run_id: of the run.
        splits: what.
        contexts: for what, one for each.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=split.name,
                digest=split.digest,
                source_type="flagscale",
                source=mask(json.dumps(split.source))[:_LONGEST_TEXT],
                profile=json.dumps(split.profile)[:_LONGEST_TEXT],
            ),
            [InputTag(_CONTEXT_TAG, context)],
        )
        for split, context in zip(splits, contexts, strict=True)
    ]
    client.log_inputs(run_id, inputs)
