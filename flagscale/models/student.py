"""A student's first weights: some or all of the teacher's layers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.models.gpt import GPTModel

_LAYERS = "decoder.layers."


def copy_from_teacher(student: GPTModel, teacher: GPTModel, keep_layers: Sequence[int]) -> None:
    """Give `student` the teacher's embedding, norms, output layer, and the layers to keep.

    Args:
        student: a model of the teacher's width with `len(keep_layers)` layers; changed in place.
        teacher: a whole model, not one stage of a pipeline.
        keep_layers: the teacher's layers, from 0, that become the student's, in order.

    Raises:
        RuntimeError: the student's tensors do not fit.
    """
    position = {layer: index for index, layer in enumerate(keep_layers)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        if not name.startswith(_LAYERS):
            state[name] = tensor
            continue
        layer, rest = name.removeprefix(_LAYERS).split(".", 1)
        if int(layer) in position:
            state[f"{_LAYERS}{position[int(layer)]}.{rest}"] = tensor
    student.load_state_dict(state)
