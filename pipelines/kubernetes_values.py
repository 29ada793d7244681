"""Kubernetes' names and quantities: of a platform file, and of a run's parameters.

What Kubernetes would refuse only when a pod is to start is refused here.
"""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field


def _written(quantity: object) -> object:
    """`cpu: 4` is a number in YAML, and a quantity as good as `"4"` in Kubernetes."""
    is_number = isinstance(quantity, int | float) and not isinstance(quantity, bool)
    return str(quantity) if is_number else quantity


_Written = BeforeValidator(_written)
CpuQuantity = Annotated[str, _Written, Field(pattern=r"^([0-9]*\.)?[0-9]+m?$")]
Quantity = Annotated[str, _Written, Field(pattern=r"^[1-9][0-9]*([EPTGM]i?|Ki)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)]


def _not_taken(claim: str) -> str:
    if claim in ("tmp", "dshm"):
        raise ValueError(
            "KFP names the volume after it, and every pod has one of this name already"
        )
    return claim


# KFP names the pod's volume after the claim, and volumes' names have no dots.
ClaimName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63),
    AfterValidator(_not_taken),
]
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_PREFIX = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/"
LabelKey = Annotated[str, Field(pattern=rf"^({_PREFIX})?{_LABEL}$")]
LabelValue = Annotated[str, Field(pattern=rf"^({_LABEL})?$")]
QueueName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=63)]
ResourceName = Annotated[str, Field(pattern=rf"^{_PREFIX}{_LABEL}$")]
ImageName = Annotated[str, Field(pattern=r"^\S+$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
MountPath = Annotated[str, Field(pattern=r"^/[^:]*[^:/]$")]
Duration = Annotated[str, Field(pattern=r"^[0-9]+s$")]
