"""What pipeline stages of a distillation model pass on: the student's and the teacher's tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model

Shapes = list[tuple[int, ...]]


def adjust_tensor_shapes_fn(
    chunks: Sequence[GPTModel], sizes: dict[str, Any]
) -> Callable[[Shapes, Shapes], tuple[Shapes, Shapes]] | None:
    """For the schedule's argument of that name; None where nothing is to be adjusted.

    Args:
        chunks: this rank's chunks of the model, wrapped or not.
        sizes: the schedule's `seq_length`, `micro_batch_size` and `decoder_seq_length`.
    """
    if not hasattr(unwrap_model(chunks[0]), "compute_kd_loss"):
        return None  # no distillation model of ModelOpt's, which then need not be imported
    from flagscale.post_training.upstream import mtd_megatron

    adjust: Callable[[Shapes, Shapes], tuple[Shapes, Shapes]] | None = (
        mtd_megatron.get_tensor_shapes_adjust_fn_for_distillation(list(chunks), **sizes)
    )
    return adjust
