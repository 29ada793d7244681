"""What every layer of a model makes of a text, and the same text in transformers' layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.utils._pytree import tree_map_only

from flagscale.imports import late, uncollected
from flagscale.models import reload_hf
from flagscale.models.megatron import logits


@dataclass(frozen=True)
class Outputs:
    """What a model computes of a few tokens, on the CPU.

    Attributes:
        hidden_bsh: float32 [b, s, h] each: the embedding, then what each layer makes of the one
            before.
        logits_bsv: float32 [b, s, vocabulary].
        rounded: what the same parts, logits included, make of the same states in 16 bits; empty
            where they were not asked for.
    """

    hidden_bsh: tuple[torch.Tensor, ...]
    logits_bsv: torch.Tensor
    rounded: tuple[torch.Tensor, ...] = ()


@torch.no_grad()
def layer_outputs(model: GPTModel, tokens: torch.Tensor) -> Outputs:
    """Run a model on int64 `tokens` [b, s]. All ranks call it, and get the whole."""
    hidden: dict[int, torch.Tensor] = {}

    def keep(number: int, states_sbh: torch.Tensor) -> None:
        if model.config.sequence_parallel:
            states_sbh = gather_from_sequence_parallel_region(states_sbh)
        hidden[number] = states_sbh.float().transpose(0, 1).cpu()

    def before(layer: Any, _inputs: Any, named: dict[str, Any]) -> None:  # noqa: ANN401
        if layer.layer_number == 1:
            keep(0, named["hidden_states"])

    def after(layer: Any, _inputs: Any, output: Any) -> None:  # noqa: ANN401
        keep(layer.layer_number, output[0])

    hooks = [layer.register_forward_hook(after) for layer in model.decoder.layers]
    hooks += [
        layer.register_forward_pre_hook(before, with_kwargs=True) for layer in model.decoder.layers
    ]
    logits_bsv = logits(model, tokens).cpu()
    for hook in hooks:
        hook.remove()
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[int, torch.Tensor]] = [{}] * group.size()
    torch.distributed.all_gather_object(stages, hidden, group=group)
    every = {number: states for stage in stages for number, states in stage.items()}
    return Outputs(tuple(every[number] for number in sorted(every)), logits_bsv)


@torch.no_grad()
def in_transformers(
    folder: Path,
    tokens: torch.Tensor,
    hidden_bsh: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
) -> Outputs:
    """Run transformers' model of a folder, a layer at a time, in float32.

    Args:
        folder: of a Hugging Face model.
        tokens: int64 [b, s].
        hidden_bsh: another model's, from `layer_outputs`.
        dtype: that the other model computed in. Where that is not float32, transformers' layers
            compute in it too, to tell what rounding alone does.
        vocab_size: tokens that the other model knows; those beyond are left out.

    Returns:
        transformers' own logits; and its embedding, then what each of its layers, at last the
        norm with the output layer, makes of the *other* model's states before it. So each is
        compared by itself: what differs in one does not spread to the next.
    """
    # transformers imports the model's code only now, and torch's compiler; SciPy is for losses of
    # object detection.
    with uncollected(), late({"scipy.optimize": ("linear_sum_assignment",)}):
        model = reload_hf.streamed(folder)
    made: list[torch.Tensor] = []
    rounded: list[torch.Tensor] = []
    normed: list[torch.Tensor] = []

    def rounding(module: torch.nn.Module, *inputs: Any, **named: Any) -> None:  # noqa: ANN401
        if dtype != torch.float32:
            # In place: its weights are dropped afterwards.
            output = module.to(dtype).forward(*_as(inputs, dtype), **_as(named, dtype))
            rounded.append(_first(output).float())

    def embedded(module: Any, inputs: Any, output: torch.Tensor) -> None:  # noqa: ANN401
        made.append(output)
        rounding(module, *inputs)

    def again(
        number: int,
        layer: torch.nn.Module,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
        _output: Any,  # noqa: ANN401
    ) -> None:
        made.append(_first(layer.forward(hidden_bsh[number], *inputs[1:], **named)))
        rounding(layer, hidden_bsh[number], *inputs[1:], **named)

    def normed_again(norm: torch.nn.Module, _inputs: Any, _output: Any) -> None:  # noqa: ANN401
        normed.append(norm.forward(hidden_bsh[-1]))
        rounding(norm, hidden_bsh[-1])

    def predicted_again(head: torch.nn.Module, _inputs: Any, _output: Any) -> None:  # noqa: ANN401
        made.append(head.forward(normed.pop()))
        if rounded:
            rounding(head, rounded.pop())  # of the norm, which is a part of this one

    # Before the hooks that drop the weights.
    model.model.embed_tokens.register_forward_hook(embedded, prepend=True)
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(partial(again, number), prepend=True, with_kwargs=True)
    model.model.norm.register_forward_hook(normed_again, prepend=True)
    model.lm_head.register_forward_hook(predicted_again, prepend=True)
    logits_bsv = model(tokens, use_cache=False).logits[..., :vocab_size]
    for outputs in filter(None, (made, rounded)):
        outputs[-1] = outputs[-1][..., :vocab_size]
    return Outputs(tuple(made), logits_bsv, tuple(rounded))


def _first(output: Any) -> torch.Tensor:  # noqa: ANN401 - of some layers a tuple
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _as(values: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - whatever a layer is called with
    """The same with every floating-point tensor in another dtype."""
    return tree_map_only(
        torch.Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, values
    )
