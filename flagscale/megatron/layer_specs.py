"""Which modules a model's layers are made of: Megatron-Core's layer specs, chosen by arguments."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeAlias, TypeVar, cast

from megatron.core.models import backends
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
    get_gpt_heterogeneous_layer_spec,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from flagscale.errors import UserError
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.attention import SDPACoreAttention
from flagscale.megatron.norm import NORMS

LayerSpec: TypeAlias = ModuleSpec | TransformerBlockSubmodules
SpecT = TypeVar("SpecT")


def layer_spec(
    args: Arguments, config: TransformerConfig, vp_stage: int | None = None
) -> LayerSpec:
    """The layers of one model chunk: transformer-engine's, or Megatron-Core's own with torch's.

    Args:
        args: of the run.
        config: that the model is built with.
        vp_stage: which virtual pipeline stage.

    Raises:
        UserError: the recipe's own spec cannot be loaded.
    """
    if args.shape.architecture.spec is not None:
        layer = custom_spec(args.shape.architecture.spec, config)
        if args.transformer_impl == "transformer_engine":
            return layer
        return _block(layer, config, vp_stage)
    if args.transformer_impl == "transformer_engine":
        return _transformer_engine_spec(config, vp_stage)
    block = _with_torch_kernels(_local_spec(config, vp_stage), config)
    if not config.heterogeneous_block_specs:  # those come with their names
        block.layer_specs = [_named(layer, config) for layer in block.layer_specs]
    return block


def mtp_block_spec(
    args: Arguments, config: TransformerConfig, spec: LayerSpec, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token prediction block, on the chunk that holds it.

    Args:
        args: of the run.
        config: that the model is built with.
        spec: from `layer_spec`; the block's layers are like its last.
        vp_stage: which virtual pipeline stage.
    """
    if config.mtp_num_layers is None:
        return None
    if args.transformer_impl == "transformer_engine":
        return get_gpt_mtp_block_spec(config, spec, use_transformer_engine=True, vp_stage=vp_stage)
    block = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=vp_stage)
    return _with_torch_kernels(block, config)


def custom_spec(name: str, config: TransformerConfig) -> ModuleSpec:
    """Load a layer spec by its name.

    Args:
        name: `module:name` of a ModuleSpec, or of a function that makes one of the config.
        config: that the model is built with.

    Raises:
        UserError: there is no such module or name, or it is something else.
    """
    where = f"architecture.spec={name!r}"
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{where}: must read 'module:name'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{where}: cannot import {module_name} ({error}); its folder must be on PYTHONPATH"
        ) from error
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        public = ", ".join(n for n in vars(module) if not n.startswith("_")) or "nothing"
        raise UserError(f"{where}: {module_name} has no {attribute}; it has {public}") from error
    # A ModuleSpec can be called too, which builds the module.
    try:
        made = found if isinstance(found, ModuleSpec) or not callable(found) else found(config)
    except Exception as error:  # whatever a function of one's own raises
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(made, ModuleSpec):
        raise UserError(
            f"{where}: must be a megatron.core ModuleSpec or a function of the TransformerConfig "
            f"that returns one, not {type(made).__name__}"
        )
    return made


def replace_modules(spec: SpecT, replacements: Mapping[type, type]) -> SpecT:
    """A copy of a tree of specs in which some modules are others.

    Args:
        spec: a ModuleSpec, a dataclass of submodules, or a container of either, at any depth.
        replacements: module class -> what takes its place.
    """
    node: Any = spec
    if isinstance(node, type):
        node = replacements.get(node, node)
    elif is_dataclass(node):
        values = {f.name: getattr(node, f.name) for f in fields(node) if f.init}
        changes = {name: replace_modules(value, replacements) for name, value in values.items()}
        node = replace(cast(Any, node), **changes)
    elif isinstance(node, dict):
        node = {key: replace_modules(value, replacements) for key, value in node.items()}
    elif isinstance(node, list | tuple):
        node = type(node)(replace_modules(value, replacements) for value in node)
    result: SpecT = node
    return result


def _transformer_engine_spec(config: TransformerConfig, vp_stage: int | None) -> LayerSpec:
    if config.heterogeneous_block_specs:
        return get_gpt_heterogeneous_layer_spec(config, use_te=True, vp_stage=vp_stage)
    if config.num_moe_experts is not None:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    return get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=config.qk_layernorm, multi_latent_attention=config.multi_latent_attention
    )


def _local_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    if config.heterogeneous_block_specs:
        return get_gpt_heterogeneous_layer_spec(config, use_te=False, vp_stage=vp_stage)
    if config.num_moe_experts is not None:
        return get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization=config.normalization,
            vp_stage=vp_stage,
        )
    layer = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    return _block(layer, config, vp_stage)


def _block(
    layer: ModuleSpec, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """A chunk of equal layers with our final norm.

    Given the layer alone, Megatron-Core takes transformer-engine's norm wherever that is installed.
    """
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * count, layer_norm=NORMS[config.normalization]
    )


def _named(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """The local layer with the names that transformer-engine's has in a checkpoint.

    There, norms are part of the projection behind them where they can be. Megatron-Core's local
    specs know that for plain layers only, so that experts and latent attention trained with one
    implementation could not be loaded into the other.
    """
    names = {}
    if not config.multi_latent_attention:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    elif config.qk_layernorm:
        names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
        if config.q_lora_rank is not None:
            names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
    if layer.submodules.mlp.module is not MoELayer:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    submodules = replace(layer.submodules, sharded_state_dict_keys_map=names)
    return replace(layer, submodules=submodules)


def _with_torch_kernels(spec: SpecT, config: TransformerConfig) -> SpecT:
    """The spec with our core attention and norms, wherever Megatron-Core's own stand."""
    norm = NORMS[config.normalization]
    return replace_modules(
        spec,
        {
            DotProductAttention: SDPACoreAttention,
            WrappedTorchNorm: norm,
            # Apex's fused norm, where that is installed.
            backends.LNImpl: norm,
        },
    )
