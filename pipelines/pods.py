"""What a platform file says of the pods of one kind of step."""

from __future__ import annotations

from typing import Annotated

from kubernetes.utils import parse_quantity
from pydantic import AfterValidator, Field, model_validator

from flagscale.recipe import Section
from flagscale.recipe.section import Line, NonNegativeInt, Positive, PositiveInt
from flagscale.run_values.kubernetes_names import LabelKey, LabelValue, Plain, ResourceName
from flagscale.run_values.toleration import Toleration
from flagscale.sizes.machine import ACCELERATORS
from pipelines.kubernetes_values import CpuQuantity, Duration, Quantity, QueueName, Seconds


def _known_accelerator(name: str) -> str:
    if name not in ACCELERATORS:
        raise ValueError(
            f"{name!r} is none of {', '.join(ACCELERATORS)}; give accelerator_memory and "
            "accelerator_tflops instead"
        )
    return name


AcceleratorName = Annotated[Line, AfterValidator(_known_accelerator)]


class Retries(Section):
    """How often a failed pod is started again; a training goes on from its last checkpoint."""

    count: NonNegativeInt = Field(
        2, description="Times; also those that a TrainJob's nodes are started anew"
    )
    backoff: Duration = Field("30s", description="Pause before the first")
    factor: Annotated[PositiveInt, Field(le=100)] = Field(
        2, description="Each pause is so much longer than the last"
    )
    max_duration: Duration = Field(
        "604800s",
        description="From the first start: no retry begins later, and one that runs ends then",
    )

    @model_validator(mode="after")
    def _check(self) -> Retries:
        if self.count and not self.seconds:
            raise ValueError(
                f"max_duration={self.max_duration} leaves no time for count={self.count}; count=0 "
                "is for none"
            )
        return self

    @property
    def seconds(self) -> int:
        """`max_duration` as a number."""
        return int(self.max_duration.removesuffix("s"))


class Pods(Section):
    """What the pods of one kind of step get."""

    accelerator_type: ResourceName = Field("nvidia.com/gpu", description="Kubernetes resource name")
    accelerator_count: Annotated[NonNegativeInt, Field(le=2**16)] = Field(
        0, description="Accelerators a pod"
    )
    accelerator: AcceleratorName | None = Field(
        None, description="Its model, whose memory and speed `plan` knows, e.g. H100-80GB"
    )
    accelerator_memory: Quantity | None = Field(
        None, description="Of one accelerator, where `accelerator` does not say it"
    )
    accelerator_tflops: Positive | None = Field(
        None, description="Its dense bf16 speed at most; ditto"
    )
    price_per_hour: Positive | None = Field(
        None, description="Of one pod, in any currency; for `plan`"
    )
    cpu: CpuQuantity = Field("2", description="Kubernetes CPU quantity, requested")
    memory: Quantity = Field("8Gi", description="Kubernetes memory quantity, request and limit")
    shared_memory: Quantity | None = Field(
        None, description="Size of /dev/shm, part of `memory`; NCCL and data loaders want it"
    )
    node_selector: dict[LabelKey, LabelValue] = Field({}, description="Labels of the nodes")
    tolerations: tuple[Toleration, ...] = Field((), description="Taints that are no obstacle")
    labels: dict[LabelKey, LabelValue] = Field({}, description="Of the pods")
    annotations: dict[LabelKey, Plain] = Field({}, description="Of the pods")
    queue: QueueName | None = Field(None, description="Kueue's local queue (a label of the pods)")
    priority: QueueName | None = Field(
        None, description="Kueue's WorkloadPriorityClass (a label): KFP has no priorityClassName"
    )
    retries: Retries = Retries()
    timeout_seconds: Seconds | None = Field(
        None, description="A pod that runs longer is ended, and counts as failed"
    )

    @model_validator(mode="after")
    def _check(self) -> Pods:
        for name in self._kueue_labels:
            if name in self.labels:
                raise ValueError(f"labels.{name}={self.labels[name]}: queue or priority gives it")
        if self.shared_memory and parse_quantity(self.shared_memory) > parse_quantity(self.memory):
            raise ValueError(
                f"shared_memory={self.shared_memory} is part of memory={self.memory}, and must "
                "not be larger"
            )
        if self.retries.count and self.retries.seconds < (self.timeout_seconds or 0):
            raise ValueError(
                f"retries.max_duration={self.retries.max_duration} would end a pod before its "
                f"timeout_seconds={self.timeout_seconds}; it must not be less"
            )
        return self

    @property
    def _kueue_labels(self) -> dict[str, str]:
        kueue = {"queue-name": self.queue, "priority-class": self.priority}
        return {f"kueue.x-k8s.io/{k}": v for k, v in kueue.items() if v}

    @property
    def all_labels(self) -> dict[str, str]:
        """`labels`, and those by which Kueue knows queue and priority."""
        return self.labels | self._kueue_labels
