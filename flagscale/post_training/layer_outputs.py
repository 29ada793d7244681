"""Keeps what some layers return in a forward pass, or what goes into their core attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp

from flagscale.megatron.paired_layers import Pair, PairedLayer
from flagscale.megatron.pipeline_cargo import Key, key_of

_INPUTS = ("query", "key", "value")  # of core attention, in its order


class LayerOutputs:
    """What the layers of one pipeline stage have given in the last forward pass.

    Attributes:
        handles: of the hooks.
    """

    def __init__(self, pairs: Sequence[Pair], models: dict[str, GPTModel], stage: int) -> None:
        """Watch the layers of `stage`.

        Args:
            pairs: whose layers are watched.
            models: `student` and `teacher`: this stage's parts.
            stage: of the pipeline.

        Raises:
            ValueError: a layer is not there, or does nothing.
        """
        self._kept: dict[Key, torch.Tensor] = {}
        self._is_watching = False
        self.handles: list[Any] = []
        seen = set()
        for who, layer in (one for pair in pairs for one in pair.layers):
            key = key_of(who, layer)
            if layer.stage == stage and key not in seen:
                seen.add(key)
                self.handles.append(self._watch(key, _module(models[who], who, layer)))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what comes inside; not what is computed again later, for the backward pass."""
        self._kept, self._is_watching = {}, True
        try:
            yield
        finally:
            self._is_watching = False

    def take(self) -> dict[Key, torch.Tensor]:
        """What was kept: [s, b, channels]. It is let go here."""
        kept, self._kept = self._kept, {}
        return kept

    def _watch(self, key: Key, module: torch.nn.Module) -> Any:  # noqa: ANN401 - torch's handle
        part = key[2]
        if part in _INPUTS:
            keep = partial(self._keep_input, key, _INPUTS.index(part))
            return module.register_forward_pre_hook(keep)
        return module.register_forward_hook(partial(self._keep_output, key))

    def _keep_output(self, key: Key, module: torch.nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
        if self._is_watching:
            tensor = output[0] if isinstance(output, tuple) else output  # some return a bias too
            # Attention to packed documents returns [t, channels].
            self._kept[key] = tensor if tensor.dim() > 2 else tensor.unsqueeze(1)

    def _keep_input(self, key: Key, index: int, module: torch.nn.Module, inputs: Any) -> None:  # noqa: ANN401
        if self._is_watching:
            if len(inputs) > len(_INPUTS) and inputs[len(_INPUTS)] is not None:
                raise ValueError(
                    "an attention_mask with attention_layer_pairs: relations are of tokens that "
                    "see all before them in their document; leave the mask out, or pack documents"
                )
            # Of packed documents [t, heads, channels].
            query, part = (
                tensor if tensor.dim() > 3 else tensor.unsqueeze(1)
                for tensor in (inputs[0], inputs[index])
            )
            self._kept[key] = part.repeat_interleave(query.size(2) // part.size(2), 2).flatten(2)


def _module(model: GPTModel, who: str, layer: PairedLayer) -> torch.nn.Module:
    where = f"distillation's pairs: {layer.name} of the {who}"
    try:
        module = model.get_submodule(layer.local_name)
    except AttributeError as error:
        raise ValueError(f"{where} is not there: {error}") from error
    if isinstance(module, IdentityOp):
        raise ValueError(
            f"{where} does nothing here: transformer-engine's norm is a part of the projection "
            "behind it, and a block of heterogeneous_layers_config may have neither attention nor "
            "MLP; pair the whole layer, or the one before"
        )
    return module
