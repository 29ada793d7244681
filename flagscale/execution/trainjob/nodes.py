"""What the launcher of a TrainJob is told of its nodes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from flagscale import variables
from flagscale.errors import UserError
from flagscale.recipe import ParallelismRecipe, Section
from flagscale.recipe.section import Line, NonNegativeInt, PositiveInt
from flagscale.run_values.kubernetes_names import LabelKey, Plain
from flagscale.run_values.network import Network

IN_ONE_POD = "in the step's own pod (resources.nodes=1, trainer.min_nodes=2)"


class NodePods(Section):
    """The training's pods, one a node: what the platform file says of them."""

    cpu: Line = Field("2", description="Kubernetes CPU quantity, requested")
    memory: Line = Field("16Gi", description="Kubernetes memory quantity, request and limit")
    accelerator_type: Line = Field("nvidia.com/gpu", description="Resource name of accelerators")
    runtime: Line = Field("torch-distributed", description="A (Cluster)TrainingRuntime")
    timeout_seconds: PositiveInt | None = Field(
        None, description="A training that runs longer is ended, and counts as failed"
    )
    restarts: NonNegativeInt = Field(
        2, description="Times that all are started anew when one was stopped, killed or lost"
    )
    annotations: dict[LabelKey, Plain] = Field({}, description="Of the pods")
    network: Network = Network()


def accelerators_of(text: str) -> int:
    """A run's parameter `training_accelerator_count`, which KFP passes on as text.

    Raises:
        UserError: it is no whole number.
    """
    if not text.isdecimal():
        raise UserError(f"training_accelerator_count={text!r}: must be a whole number, e.g. 8")
    return int(text)


def processes_per_node(parallelism: ParallelismRecipe, nodes: int, accelerator_count: int) -> int:
    """How many ranks train on each node: the recipe's number, or one an accelerator.

    Without accelerators as few as hold the model a whole number of times.

    Args:
        parallelism: the layout.
        nodes: pods that train together.
        accelerator_count: of each.

    Raises:
        UserError: the recipe wants more ranks on a node than it has accelerators.
    """
    wanted = parallelism.processes
    if accelerator_count and wanted is not None and wanted > accelerator_count:
        raise UserError(
            f"training.parallelism.processes={wanted} on each node, but a node has "
            f"{accelerator_count} accelerators; NCCL takes one process on each"
        )
    if wanted is not None:
        return wanted
    if accelerator_count:
        return accelerator_count
    return math.lcm(parallelism.smallest_world_size, nodes) // nodes


def shared_folder(paths: Mapping[str, str | Path]) -> Path:
    """The volume that the launcher and all nodes see.

    Args:
        paths: field -> what the ranks read or write; must be on it.

    Raises:
        UserError: there is none, or it does not hold one of `paths`.
    """
    place = os.environ.get(variables.SHARED, "")
    if not place or "://" in place:
        raise UserError(
            f"{variables.SHARED}={place or '(unset)'}: a TrainJob needs a folder that all "
            "pods see; give the platform file a volume (`shared.claim` or `shared.create`, "
            f"ReadWriteMany), or train {IN_ONE_POD}"
        )
    shared = Path(place)
    if not os.access(shared, os.W_OK):
        raise UserError(f"{variables.SHARED}={place}: no such folder, or it is not writable")
    for field, path in paths.items():
        if not Path(path).resolve().is_relative_to(shared.resolve()):
            raise UserError(f"{field}={path} must lie under {place}, which all nodes see")
    return shared
