"""The container images that steps run in: named here and nowhere else.

`FLAGSCALE_IMAGE` overrides both, e.g. with a digest from one's own registry. On this machine
(`python -m pipelines run`) no image is used.
"""

import importlib.metadata
import os

VERSION = importlib.metadata.version("flagscale-distillation")


def image(accelerators: int = 0) -> str:
    """Name of the image for a step that is given so many accelerators."""
    kind = "gpu" if accelerators else "cpu"
    return os.environ.get("FLAGSCALE_IMAGE", f"flagscale-distillation:{VERSION}-{kind}")
