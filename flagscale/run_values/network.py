"""What the pods of a training on several nodes need for a fast network between them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from flagscale.recipe import Section
from flagscale.recipe.section import PositiveInt, Source
from flagscale.run_values.kubernetes_names import LabelKey, Plain, ResourceName, Variable

Capability = Annotated[str, Field(pattern=r"^[A-Z][A-Z_]*$", max_length=63, examples=["IPC_LOCK"])]
HostFolder = Annotated[Source, Field(pattern=r"^/[^:]*[^:/]$", examples=["/opt/network/lib"])]
_OURS = "sidecar.istio.io/inject"


class Network(Section):
    """InfiniBand, RoCE or GPUDirect, for the pods of a TrainJob: no other pods talk to one another.

    KFP's executor configuration has no place for resources, capabilities and folders of the node,
    and a training in its step's own pod needs none.
    """

    resources: dict[ResourceName, PositiveInt] = Field(
        {}, description="Of each pod, beside its accelerators: name: count"
    )
    annotations: dict[LabelKey, Plain] = Field(
        {}, description="Of the pods, e.g. the names of more networks"
    )
    capabilities: tuple[Capability, ...] = Field(
        (), description="Of the container, as in Kubernetes, without CAP_"
    )
    host_network: bool = Field(
        False, description="The nodes' own network: `runtime` must say so, a TrainJob cannot"
    )
    host_folders: dict[HostFolder, HostFolder] = Field(
        {}, description="Folders of the node that pods read: on the node: in the pod"
    )
    env: dict[Variable, Plain] = Field({}, description="Of the ranks, e.g. NCCL's; no secrets")

    @model_validator(mode="after")
    def _check(self) -> Network:
        if _OURS in self.annotations:
            raise ValueError(f"annotations.{_OURS}: the launcher sets it, to false")
        for name in self.capabilities:
            if name.startswith("CAP_"):
                right = name.removeprefix("CAP_")
                raise ValueError(f"capabilities: {name} is {right} in Kubernetes")
        inside = list(self.host_folders.values())
        if len(set(inside)) < len(inside):
            raise ValueError(f"host_folders={self.host_folders}: two of them at one path")
        return self
