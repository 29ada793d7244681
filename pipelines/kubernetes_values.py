"""Kubernetes' quantities, and what else only a platform file says of pods.

What Kubernetes would refuse only when a pod is to start is refused here.
"""

import posixpath
from pathlib import PurePosixPath
from typing import Annotated

from kubernetes.utils import parse_quantity
from pydantic import AfterValidator, BeforeValidator, Field

from flagscale.recipe.section import PositiveInt, Source
from flagscale.run_values.kubernetes_names import DOMAIN

# Where the pipeline, and KFP's own volumes, are mounted; what an image's programs need.
_TAKEN_PATHS: tuple[str, ...] = ("/tmp", "/dev", "/kfp-launcher")  # noqa: S108
_TAKEN_PATHS += ("/gcs", "/s3", "/minio", "/.local", "/.cache", "/.config")
_TAKEN_PATHS += ("/bin", "/etc", "/lib", "/lib64", "/opt", "/sbin", "/usr")
_TAKEN_PATHS += ("/proc", "/run", "/sys", "/var/run")
_MOST_CORES = 2**16
_LARGEST = "1Ei"  # beyond, Kubernetes counts no further
_SMALLEST = "64Mi"  # of a pod's memory or a volume: less is a forgotten unit


def _written(quantity: object) -> object:
    """`cpu: 4` is a number in YAML, and a quantity as good as `"4"` in Kubernetes."""
    is_number = isinstance(quantity, int | float) and not isinstance(quantity, bool)
    return str(quantity) if is_number else quantity


def _some(cpu: str) -> str:
    cores = parse_quantity(cpu)
    if cores == 0:
        raise ValueError("must be more than 0")
    if cores > _MOST_CORES:
        raise ValueError(f"must be no more than {_MOST_CORES}")
    if cores * 1000 % 1:
        raise ValueError("must be whole thousandths, which is as fine as Kubernetes takes it")
    return cpu


def _enough(quantity: str) -> str:
    size = parse_quantity(quantity)
    if size < parse_quantity(_SMALLEST):
        raise ValueError(f"is {size} bytes; must be {_SMALLEST} or more, e.g. 16Gi")
    if size > parse_quantity(_LARGEST):
        raise ValueError(f"must be {_LARGEST} or less")
    return quantity


def free(path: str) -> str:
    """The path, if pods have nothing there.

    Raises:
        ValueError: what it must be like.
    """
    if path.startswith("//") or path != posixpath.normpath(path):
        raise ValueError("must be written without //, . and ..")
    mount = PurePosixPath(path)
    for taken in map(PurePosixPath, _TAKEN_PATHS):
        if mount.is_relative_to(taken) or taken.is_relative_to(mount):
            raise ValueError(f"every pod has something at {taken} already")
    return path


_Written = BeforeValidator(_written)
CpuQuantity = Annotated[
    str,
    _Written,
    Field(pattern=r"^([0-9]*\.)?[0-9]+m?$", max_length=32, examples=["4", "500m"]),
    AfterValidator(_some),
]
Quantity = Annotated[
    str,
    _Written,
    Field(pattern=r"^[1-9][0-9]*([EPTGM]i?|Ki)?$", max_length=32, examples=["16Gi"]),
    AfterValidator(_enough),
]
QueueName = Annotated[str, Field(pattern=rf"^{DOMAIN}$", max_length=63, examples=["my-queue"])]
SecretKey = Annotated[
    str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253, examples=["access-key"])
]
MountPath = Annotated[
    Source,
    Field(pattern=r"^/[^:]*[^:/]$", examples=["/mnt/flagscale"]),
    AfterValidator(free),
]
# KFP reads it as Go does, whose durations end at 292 years.
Duration = Annotated[str, Field(pattern=r"^[0-9]{1,9}s$", examples=["300s"])]
# Of Argo's and Kubernetes' deadlines, which are int32. KFP's compiler drops a 0 without a word.
Seconds = Annotated[PositiveInt, Field(le=2**31 - 1)]
