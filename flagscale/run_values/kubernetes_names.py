"""Kubernetes' names and labels: of a platform file, and of a run's parameters.

What Kubernetes would refuse only when a pod is to start is refused here.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LONGEST_DOMAIN = 253
_LONGEST_KEY = _LONGEST_DOMAIN + 1 + 63
_DOMAIN_PART = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
DOMAIN = rf"{_DOMAIN_PART}(\.{_DOMAIN_PART})*"
_LONGEST_IMAGE = 255  # of a container runtime, without the digest
_FOLDER = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(({DOMAIN}|\[[0-9a-f:]+\])(:[0-9]+)?/)?{_FOLDER}(/{_FOLDER})*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)


def check_image(name: str) -> str:
    """The name, if it is one that a container runtime takes.

    Raises:
        ValueError: what it must be like.
    """
    if not _IMAGE.fullmatch(name):
        raise ValueError(
            "must be like registry.example.com/team/name:tag or name@sha256:(64 hexadecimal "
            "digits), in lower case but for the tag, without https:// and blanks"
        )
    if len(name.partition("@")[0]) > _LONGEST_IMAGE:
        raise ValueError(f"must be no longer than {_LONGEST_IMAGE} characters")
    return name


def _short_prefix(key: str) -> str:
    if len(key.rpartition("/")[0]) > _LONGEST_DOMAIN:
        raise ValueError(f"before / must be no more than {_LONGEST_DOMAIN} characters")
    return key


def _plain(value: str) -> str:
    """Argo would take what stands between for its own, and end the run that it does not know."""
    if "{{" in value:
        raise ValueError("must not hold {{, which Argo replaces")
    return value


def _not_taken(claim: str) -> str:
    if claim in ("tmp", "dshm"):
        raise ValueError(
            "KFP names the volume after it, and every pod has one of this name already"
        )
    return claim


Name = Annotated[
    str, Field(pattern=rf"^{DOMAIN}$", max_length=_LONGEST_DOMAIN, examples=["my-name"])
]
# KFP names the pod's volume after the claim, and volumes' names have no dots.
ClaimName = Annotated[
    str,
    Field(pattern=rf"^{_DOMAIN_PART}$", max_length=63, examples=["my-claim"]),
    AfterValidator(_not_taken),
]
LabelKey = Annotated[
    str,
    Field(
        pattern=rf"^({DOMAIN}/)?{LABEL}$",
        max_length=_LONGEST_KEY,
        examples=["pool", "example.com/pool"],
    ),
    AfterValidator(_short_prefix),
]
LabelValue = Annotated[str, Field(pattern=rf"^({LABEL})?$", max_length=63, examples=["h100"])]
ResourceName = Annotated[
    str,
    Field(pattern=rf"^{DOMAIN}/{LABEL}$", max_length=_LONGEST_KEY, examples=["nvidia.com/gpu"]),
    AfterValidator(_short_prefix),
]
Variable = Annotated[
    str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=1000, examples=["HF_TOKEN"])
]
ImageName = Annotated[str, Field(max_length=1000), AfterValidator(check_image)]
# As Kubernetes has them: `$(NAME)` in a variable is the value of another.
Plain = Annotated[str, Field(max_length=10_000), AfterValidator(_plain)]
