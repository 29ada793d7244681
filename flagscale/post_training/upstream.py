"""ModelOpt's distillation, imported once and here, and only by what distils.

ModelOpt imports a plugin for every library that it finds. That for transformers pulls in its
trainer, `datasets` and pandas: as much again as torch, and a distillation uses none of it.
"""

from __future__ import annotations

from flagscale.imports import without

with without("transformers"):
    import modelopt.torch.distill as mtd
    import modelopt.torch.quantization as mtq
    from modelopt.torch.distill.plugins import megatron as mtd_megatron
    from modelopt.torch.quantization import nn as mtq_nn
    from modelopt.torch.quantization.plugins import megatron as mtq_megatron

__all__ = ["mtd", "mtd_megatron", "mtq", "mtq_megatron", "mtq_nn"]
