"""Every parallel layout that is tried, with what must come of it: the table's source.

`layout_worker.py` runs them, `test_layouts.py` compares them with one process and makes the table
of docs/parallelism.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KINDS = ("standard", "distillation")
TENSOR, SEQUENCE = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
EXPERT = {"expert_model_parallel_size": 2}
INTERLEAVED = {**PIPELINE, "virtual_pipeline_model_parallel_size": 2}


@dataclass(frozen=True)
class Case:
    """A layout.

    Attributes:
        name: as the table says it.
        processes: in all.
        parallelism: the recipe's section.
        training: more of the recipe's section `training`.
        model: `dense`, `experts`, `grouped experts` (in one kernel) or `mtp` (multi-token
            prediction).
        refused: kind of training -> what the error says, if it is refused.
    """

    name: str
    processes: int
    parallelism: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    model: str = "dense"
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of the case of one process that it must equal."""
        if self.model != "dense":
            return f"one process, {self.model.removeprefix('grouped ')}"
        return "one process, packed" if self.training.get("reset_attention_mask") else "one process"


NO_MTP = {"distillation": "mtp_num_layers=1"}
PACKED = {"reset_attention_mask": True}
CASES = [
    Case("one process", 1),
    Case("one process, experts", 1, model="experts"),
    Case("one process, mtp", 1, model="mtp", refused=NO_MTP),
    Case("one process, packed", 1, training=PACKED),
    Case("recompute selective", 1, training={"recompute_granularity": "selective"}),
    Case("recompute full", 1, training={"recompute_granularity": "full"}),
    Case("TP2", 2, TENSOR),
    Case("TP2, sequence parallel", 2, TENSOR | SEQUENCE),
    Case("PP2", 2, PIPELINE),
    Case(
        "PP2, interleaved (VPP2)",
        2,
        INTERLEAVED,
        refused={"distillation": "virtual_pipeline_model_parallel_size=2"},
    ),
    Case("CP2", 2, CONTEXT),
    Case("DP2", 2),
    Case("EP2, experts", 2, EXPERT, model="experts"),
    Case("DP2, experts", 2, model="experts"),
    Case("CP2, experts", 2, CONTEXT, model="experts"),
    Case(
        "TP2, sequence parallel, experts",
        2,
        TENSOR | SEQUENCE,
        model="experts",
        refused=dict.fromkeys(KINDS, "expert_model_parallel_size above 1"),
    ),
    Case(
        "TP2 x EP2, experts",
        2,
        TENSOR | EXPERT,
        model="experts",
        refused=dict.fromkeys(KINDS, "sequence_parallel=true"),
    ),
    Case("TP2 x EP2, sequence parallel, experts", 2, TENSOR | SEQUENCE | EXPERT, model="experts"),
    Case("PP2, mtp", 2, PIPELINE, model="mtp", refused=NO_MTP),
    Case("TP2, sequence parallel, mtp", 2, TENSOR | SEQUENCE, model="mtp", refused=NO_MTP),
    Case("DP2, mtp", 2, model="mtp", refused=NO_MTP),
    Case("TP2, packed", 2, TENSOR, PACKED),
    Case("PP2, packed", 2, PIPELINE, PACKED),
    Case(
        "CP2, packed",
        2,
        CONTEXT,
        PACKED,
        refused=dict.fromkeys(KINDS, "reset_attention_mask=true"),
    ),
    Case(
        "PP4",
        4,
        {"pipeline_model_parallel_size": 4},
        refused={"distillation": "num_layers=2"},
    ),
    Case("TP2 x PP2", 4, TENSOR | PIPELINE),
    Case("TP2 x PP2, sequence parallel", 4, TENSOR | SEQUENCE | PIPELINE),
    Case("TP2 x CP2", 4, TENSOR | CONTEXT),
    Case("PP2 x CP2", 4, PIPELINE | CONTEXT),
    Case("TP2 x DP2", 4, TENSOR),
    Case("PP2 x DP2", 4, PIPELINE),
    Case(
        "TP2 x EP2 x DP2, sequence parallel, experts",
        4,
        TENSOR | SEQUENCE | EXPERT,
        model="experts",
    ),
    Case("PP2 x EP2, experts", 4, PIPELINE | EXPERT, model="experts"),
]
# Distillation with logits, as it is where the output layer is not fused with the loss; see
# `test_fused_layouts.py`.
WITH_LOGITS = [
    Case(f"{case.name}, logits held", case.processes, case.parallelism, case.training)
    for case in CASES
    if case.name in ("one process", "TP2", "TP2, sequence parallel", "PP2", "CP2", "TP2, packed")
]
# What only a GPU with transformer-engine runs; see tests/gpu.
ON_GPU = [
    Case("one process, grouped experts", 1, model="grouped experts"),
    Case("EP2, grouped experts", 2, EXPERT, model="grouped experts"),
    Case("TP2 SP, tp_comm_overlap", 2, TENSOR | SEQUENCE, {"tp_comm_overlap": True}),
]
