"""What pipeline stages of a distillation model pass on: both models' tensors, and more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model

from flagscale.post_training.intermediate_terms import intermediate_terms

Shapes = list[tuple[int, ...]]


def adjust_tensor_shapes_fn(
    chunks: Sequence[GPTModel], sizes: dict[str, Any]
) -> Callable[[Shapes, Shapes], tuple[Shapes, Shapes]] | None:
    """For the schedule's argument of that name; None where nothing is to be adjusted.

    Args:
        chunks: this rank's chunks of the model, wrapped or not.
        sizes: the schedule's `seq_length`, `micro_batch_size` and `decoder_seq_length`.
    """
    model = unwrap_model(chunks[0])
    if not hasattr(model, "compute_kd_loss"):
        return None  # no distillation model of ModelOpt's, which then need not be imported
    from flagscale.post_training.upstream import mtd_megatron

    adjust: Callable[[Shapes, Shapes], tuple[Shapes, Shapes]] | None = (
        mtd_megatron.get_tensor_shapes_adjust_fn_for_distillation(list(chunks), **sizes)
    )
    if adjust is None:
        return None
    columns = intermediate_terms(model).columns

    def with_cargo(received: Shapes, sent: Shapes) -> tuple[Shapes, Shapes]:
        both = adjust(received, sent)
        widened = [
            [(*shape[:-1], shape[-1] + more) for shape in shapes]
            for shapes, more in zip(both, columns, strict=True)
        ]
        return widened[0], widened[1]

    return with_cargo
