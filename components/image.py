"""The container images that steps run in: named here and nowhere else.

`FLAGSCALE_CPU_IMAGE` and `FLAGSCALE_GPU_IMAGE` override the whole name, e.g. with a digest;
`FLAGSCALE_REGISTRY` says where the release's images were pushed. A platform file, or a run's
parameters, may name others. On this machine (`python -m pipelines run`) none is used.
"""

import importlib.metadata
import os

VERSION = importlib.metadata.version("flagscale-distillation")


def image(accelerators: int = 0) -> str:
    """Name of the image for a step that is given so many accelerators."""
    kind = "gpu" if accelerators else "cpu"
    registry = os.environ.get("FLAGSCALE_REGISTRY", "")
    name = f"flagscale-distillation:{VERSION}-{kind}"
    default = f"{registry.rstrip('/')}/{name}" if registry else name
    return os.environ.get(f"FLAGSCALE_{kind.upper()}_IMAGE", default)
