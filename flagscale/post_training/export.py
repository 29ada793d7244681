"""From a ModelOpt model back to a plain one."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model

from flagscale.post_training.fused_output_layer import unfuse_output_layer
from flagscale.post_training.upstream import mtd

# ModelOpt's adaptation to Megatron-Core sets these on the instance, and its export leaves them.
_INSTANCE_METHODS = (
    "forward",
    "sharded_state_dict",
    "compute_language_model_loss",
    "set_input_tensor",
    "set_student_input_tensor_shape",
)


def plain_student(model: GPTModel) -> GPTModel:
    """The student without its teacher and without ModelOpt, in place; a plain model stays itself.

    Args:
        model: from `model_provider`, wrapped or not.
    """
    unwrapped = unwrap_model(model)
    if not isinstance(unwrapped, mtd.DistillationModel):
        return unwrapped
    unfuse_output_layer(unwrapped)
    exported = mtd.export(unwrapped)
    for name in _INSTANCE_METHODS:
        exported.__dict__.pop(name, None)
    return exported
