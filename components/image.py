"""The container images that steps run in: named here and nowhere else.

`FLAGSCALE_CPU_IMAGE` and `FLAGSCALE_GPU_IMAGE` override the whole name, e.g. with a digest;
`FLAGSCALE_REGISTRY` says where the release's images were pushed. A platform file, or a run's
parameters, may name others. On this machine (`python -m pipelines run`) none is used.
"""

import importlib.metadata
import os

VERSION = importlib.metadata.version("flagscale-distillation")


def image(accelerators: int = 0) -> str:
    """Name of the image for a step that is given so many accelerators; an empty variable is none.

    It is as the variables have it: `pipelines.placement` checks it.
    """
    variable = "FLAGSCALE_GPU_IMAGE" if accelerators else "FLAGSCALE_CPU_IMAGE"
    registry = os.environ.get("FLAGSCALE_REGISTRY", "")
    name = release(accelerators)
    return os.environ.get(variable) or (f"{registry.rstrip('/')}/{name}" if registry else name)


def release(accelerators: int = 0) -> str:
    """Name of the release's image where it was built, and pushed to no registry yet."""
    return f"flagscale-distillation:{VERSION}-{'gpu' if accelerators else 'cpu'}"
