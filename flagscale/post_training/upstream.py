"""ModelOpt's distillation, imported once and here, and only by what distils.

ModelOpt imports a plugin for every library that it finds. That for transformers pulls in its
trainer, `datasets` and pandas: as much again as torch, and a distillation uses none of it. SciPy
takes half as long as torch, for a search and a calibration that are not ours; chardet, where it is
there, is for answers in unknown encodings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flagscale.imports import late, without

_LATE = {
    "scipy.interpolate": ("LinearNDInterpolator", "interp1d"),
    "scipy.optimize": ("curve_fit",),
    "scipy.spatial": ("QhullError",),
    "scipy.stats": ("entropy",),
}


@contextmanager
def lean() -> Iterator[None]:
    """Inside, ModelOpt is imported without what is not used of it."""
    with without("transformers", "chardet"), late(_LATE):
        yield


with lean():
    import modelopt.torch.distill as mtd
    import modelopt.torch.quantization as mtq
    from modelopt.torch.distill.plugins import megatron as mtd_megatron
    from modelopt.torch.quantization import nn as mtq_nn
    from modelopt.torch.quantization.plugins import megatron as mtq_megatron

__all__ = ["lean", "mtd", "mtd_megatron", "mtq", "mtq_megatron", "mtq_nn"]
