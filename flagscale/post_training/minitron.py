"""Width pruning by activations: ModelOpt's `mcore_minitron` on the models that are built here.

Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
(arXiv 2407.14679): a channel of the residual stream, a neuron of an MLP, a query head or an expert
is as important as what it puts out on calibration data is large. The least important go, and all
tensors lose their rows and columns.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP

from flagscale.errors import UserError
from flagscale.megatron.attention import SDPACoreAttention
from flagscale.megatron.norm import LayerNorm, RMSNorm
from flagscale.post_training.upstream import lean

with lean():
    import modelopt.torch.nas.plugins.megatron as dynamic
    import modelopt.torch.prune as mtp
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.prune.plugins import mcore_minitron

logger = logging.getLogger(__name__)

# A divisor thins out the sizes that can be asked for. With ModelOpt's own (256, 512, 8) a size that
# is no multiple is passed over in silence, and the configuration claims it all the same.
_ANY_SIZE = {
    "hidden_size_divisor": 1,
    "ffn_hidden_size_divisor": 1,
    "num_moe_experts_divisor": 1,
    "num_layers_divisor": 1,
}
_LAYERS = "decoder.layers."
Scores = dict[str, torch.Tensor]


def prune_width(
    model: GPTModel, sizes: Mapping[str, int], forward_loop: Callable[[GPTModel], None]
) -> Scores:
    """Cut a model to the sizes, in place. All ranks of a pipeline call it; there are no others.

    What remains of it are the tensors: some of its modules still go by the old sizes, so move its
    weights into a model that is built for the new ones (`move_weights`). What is kept comes in the
    order of importance, most important first, as ModelOpt has it; heads within their group.

    Args:
        model: of local layers, whole on this rank or on the stages of a pipeline.
        sizes: what is cut, by ModelOpt's names: `hidden_size`, `ffn_hidden_size`,
            `num_attention_heads` (a multiple of the key/value groups), `num_moe_experts`,
            `moe_ffn_hidden_size`.
        forward_loop: runs the model on calibration data.

    Returns:
        How important each is, float32 and larger for what stays: `hidden_size` [h], and by
        Megatron's names of modules with layers counted from 0 over the whole model:
        `decoder.layers.0.mlp` [ffn], `...self_attention` [heads], `...mlp.experts` [experts],
        `...mlp.experts.local_experts.0` [ffn].
    """
    width = model.config.kv_channels

    def run(converted: GPTModel) -> None:
        _start_at_nothing(converted)
        forward_loop(converted)

    with (
        _known_to_modelopt(model) as estimators,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),  # it prints every score
    ):
        config = mcore_minitron.get_mcore_minitron_config(**_ANY_SIZE)
        mtp.prune(
            model,
            mode=[("mcore_minitron", config)],
            constraints={"export_config": dict(sizes)},
            dummy_input=None,
            config={"forward_loop": run},
        )
    return _scores(estimators[0].activations_per_rank, width)


def move_weights(pruned: GPTModel, model: GPTModel) -> None:
    """Give a model the weights of a pruned one, and check that these are what was asked for.

    Args:
        pruned: from `prune_width`.
        model: this rank's part of the model that was asked for.

    Raises:
        UserError: a tensor that is missing, left over or of another shape: a size was passed over.
    """
    found, wanted = dict(pruned.named_parameters()), dict(model.named_parameters())
    if found.keys() != wanted.keys():
        odd = min(found.keys() ^ wanted.keys())
        raise UserError(f"width pruning: {odd} is in one of the models only, pruned and asked for")
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"width pruning: {name} has become {list(found[name].shape)}, but the student's "
                f"shape makes it {list(parameter.shape)}"
            )
        parameter.data.copy_(found[name].data)


def _scores(activations_per_rank: list[dict[str, Any]], head_width: int) -> Scores:
    """What ModelOpt ranks by, of what its hooks have summed up on each pipeline stage."""
    scores: Scores = {}
    first = 0
    for activations in activations_per_rank:
        layers = set()
        for name, summed in activations.items():
            if name == "":  # squares, of each norm over the residual stream
                parts = torch.stack([part.sqrt() for part in summed.values()]).sum(dim=0)
                scores["hidden_size"] = scores.get("hidden_size", 0) + parts.cpu()
                continue
            number, module = name.removeprefix(_LAYERS).split(".", 1)
            layers.add(int(number))
            key = f"{_LAYERS}{first + int(number)}.{module}"
            if module == "self_attention":
                scores[key] = summed.sqrt().view(-1, head_width).norm(dim=1).cpu()
            elif module == "mlp.experts":
                counts = summed["expert_sample_counts"]
                scores[key] = summed["expert_l2_scores"] / (counts + 1e-8)
            else:
                scores[key] = summed.sqrt().cpu()
        first += len(layers)
    return scores


def _start_at_nothing(converted: GPTModel) -> None:
    """Let ModelOpt's sums begin with what nothing adds to.

    An expert that is given no token would have no sum, which is an assertion. Of a layer that
    changes nothing the score is 0, which is another; layers' scores choose layers, not widths.
    """
    for module in converted.modules():
        if isinstance(module, MLP):
            width, device = module.linear_fc2.input_size, module.linear_fc2.weight.device
            module._activations = torch.zeros(width, device=device)
    for layer in converted.decoder.layers:
        layer._scores = 1.0


class _DynamicNorm(_DynamicLayerNorm):
    """A norm whose last dimension can be cut, with a bias or without."""

    def _setup(self, *, num_features: Any) -> None:  # noqa: ANN401 - ModelOpt's TracedHp
        self._register_hparam("num_features", num_features)
        for name, _ in list(self.named_parameters(recurse=False)):
            self._register_dynamic_attribute(name, self._cut_to_active_features)
        self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)


# ModelOpt knows Megatron-Core's and torch's own norms, by their very classes.
DMRegistry.register({RMSNorm: "flagscale RMSNorm", LayerNorm: "flagscale LayerNorm"})(_DynamicNorm)


class _Estimators(mcore_minitron.ImportanceEstimatorRegistry):
    """ModelOpt's hooks without means over no tokens: NaN, which no later token would mend.

    Attributes:
        activations_per_rank: the sums by modules' names, of each pipeline stage.
    """

    activations_per_rank: list[dict[str, Any]]

    def get_activations_and_layer_scores(self) -> tuple[list[dict[str, Any]], dict[int, Any]]:
        """See ModelOpt's."""
        self.activations_per_rank, layers = super().get_activations_and_layer_scores()
        return self.activations_per_rank, layers

    def register_hook(
        self,
        module: torch.nn.Module,
        hook_fn: Callable[..., None],
        hook_type: str = "forward",
        **hook_kwargs: Any,  # noqa: ANN401 - as ModelOpt's
    ) -> None:
        """Register a hook that is passed over where the module is given nothing."""

        def unless_empty(called: torch.nn.Module, inputs: tuple[Any, ...], *others: Any) -> None:  # noqa: ANN401
            if not (inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].numel() == 0):
                hook_fn(called, inputs, *others)

        super().register_hook(module, unless_empty, hook_type, **hook_kwargs)


@contextlib.contextmanager
def _known_to_modelopt(model: GPTModel) -> Iterator[list[_Estimators]]:
    """Inside, ModelOpt takes our core attention for one that it knows, and our hooks for its own.

    It knows two core attentions: Megatron-Core's plain one, and transformer-engine's, which is a
    mock where that is not installed, so that even asking fails. Ours stands where the plain one
    would, and is given the two sizes that the plain one has, for ModelOpt to change.

    Yields:
        The hooks of each model that is pruned inside.
    """
    made: list[_Estimators] = []

    def estimators(converted: GPTModel) -> _Estimators:
        made.append(_Estimators(converted))
        return made[-1]

    heads = model.config.num_attention_heads
    for module in model.modules():
        if isinstance(module, SDPACoreAttention):
            module.num_attention_heads_per_partition = heads
            module.hidden_size_per_partition = heads * model.config.kv_channels
    replaced = (
        (dynamic, "DotProductAttention", SDPACoreAttention),
        (mcore_minitron, "ImportanceEstimatorRegistry", estimators),
    )
    before = [getattr(module, name) for module, name, _ in replaced]
    try:
        for module, name, ours in replaced:
            setattr(module, name, ours)
        yield made
    finally:
        for (module, name, _), theirs in zip(replaced, before, strict=True):
            setattr(module, name, theirs)
