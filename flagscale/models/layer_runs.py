"""Runs of a model without some of its layers, and what each layer does to what goes into it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from flagscale.models.megatron import hidden_states


class LayerRuns:
    """Runs of some of a model's layers on one micro-batch. All ranks make it, and call it alike.

    What goes into each layer is held: without one more layer, only those after it are run. A stage
    of a pipeline runs its layers when the stage before it has; the last one has the result.

    Attributes:
        whole_sbh: what the whole model's output layer is given, [s, b, h], on ranks of the last
            pipeline stage; None elsewhere.
    """

    @torch.no_grad()
    def __init__(self, model: GPTModel, tokens_bs: torch.Tensor) -> None:
        """Run the whole model.

        Args:
            model: from `load_model`, not wrapped; no sequence parallelism.
            tokens_bs: int64, the same on every rank.
        """
        self._first = get_transformer_layer_offset(model.config)
        self._layers = dict(enumerate(model.decoder.layers, start=self._first))
        self._norm = model.decoder.final_layernorm
        # Of each layer, from 0: what goes into it.
        self._into: dict[int, torch.Tensor] = {}
        self._named: dict[str, Any] = {}

        def before(layer: Any, _inputs: Any, named: dict[str, Any]) -> None:  # noqa: ANN401
            self._named = {k: v for k, v in named.items() if k != "hidden_states"}
            self._into[layer.layer_number - 1] = named["hidden_states"]

        hooks = [
            layer.register_forward_pre_hook(before, with_kwargs=True)
            for layer in self._layers.values()
        ]
        try:
            self.whole_sbh = hidden_states(model, tokens_bs)
        finally:
            for hook in hooks:
                hook.remove()
        self._embedded = self._into.get(0)
        self._like = next(iter(self._into.values())).new_empty(0)
        self._shape = next(iter(self._into.values())).shape
        group = parallel_state.get_pipeline_model_parallel_group()
        self._stages: list[range] = [range(0)] * group.size()
        own = range(self._first, self._first + len(self._layers))
        torch.distributed.all_gather_object(self._stages, own, group=group)
        self._group = group

    @torch.no_grad()
    def keep(self, kept: Collection[int]) -> None:
        """Hold what goes into each of these layers, from 0, in a model that has no others."""
        self._into = {}
        self._run(kept, min(kept), self._embedded, self._into)

    @torch.no_grad()
    def without(self, layer: int, kept: Collection[int]) -> torch.Tensor | None:
        """Run a model of the layers `kept` but for one of them.

        Args:
            layer: the one left out, from 0.
            kept: what `keep` was given last, or at first all.

        Returns:
            What its output layer is given, [s, b, h], on ranks of the last pipeline stage; None
            elsewhere.
        """
        later = [number for number in kept if number > layer]
        return self._run(later, layer, self._into.get(layer), {})

    def _run(
        self,
        kept: Collection[int],
        start: int,
        hidden_sbh: torch.Tensor | None,
        into: dict[int, torch.Tensor],
    ) -> torch.Tensor | None:
        """Run the layers `kept` from the stage of `start` on, on what that stage is given there."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        first = next(number for number, layers in enumerate(self._stages) if start in layers)
        if stage < first:
            return None
        if stage > first:
            hidden_sbh = self._like.new_empty(self._shape)
            previous = parallel_state.get_pipeline_model_parallel_prev_rank()
            torch.distributed.recv(hidden_sbh, previous, group=self._group)
        assert hidden_sbh is not None, "a stage holds what goes into its layers"
        for number, layer in self._layers.items():
            if number in kept:
                into[number] = hidden_sbh
                hidden_sbh = layer(hidden_states=hidden_sbh, **self._named)[0]
        if stage + 1 < len(self._stages):
            following = parallel_state.get_pipeline_model_parallel_next_rank()
            torch.distributed.send(hidden_sbh.contiguous(), following, group=self._group)
            return None
        return hidden_sbh if self._norm is None else self._norm(hidden_sbh)


@torch.no_grad()
def block_influence(model: GPTModel, tokens_bs: torch.Tensor) -> dict[int, torch.Tensor]:
    """One minus the cosine between what goes into a layer and what comes out.

    All ranks call it, and get it of all layers, from 0: float64 [b, s] on the CPU. It is the block
    influence of ShortGPT (arXiv 2403.03853), of each token.

    Args:
        model: from `load_model`, not wrapped; no sequence parallelism.
        tokens_bs: int64, the same on every rank.
    """
    found: dict[int, torch.Tensor] = {}

    def after(layer: Any, _inputs: Any, named: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        cosine_sb = torch.cosine_similarity(
            named["hidden_states"].double(), output[0].double(), dim=-1
        )
        found[layer.layer_number - 1] = (1 - cosine_sb).T.cpu()

    hooks = [layer.register_forward_hook(after, with_kwargs=True) for layer in model.decoder.layers]
    try:
        hidden_states(model, tokens_bs)
    finally:
        for hook in hooks:
            hook.remove()
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[int, torch.Tensor]] = [{}] * group.size()
    torch.distributed.all_gather_object(stages, found, group=group)
    return {layer: influence for stage in stages for layer, influence in stage.items()}
