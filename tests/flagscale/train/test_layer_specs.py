import sys
from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from flagscale.errors import UserError
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.attention import SDPACoreAttention
from flagscale.megatron.gpt_builder import build_gpt_model
from flagscale.megatron.layer_specs import custom_spec, replace_modules
from flagscale.megatron.norm import RMSNorm
from flagscale.megatron.transformer_config import transformer_config
from flagscale.recipe import ArchitectureRecipe

SPECS = """
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

layer = get_gpt_layer_local_spec(normalization="RMSNorm")
number = 3


def by_config(config):
    assert config.num_layers == 2
    return get_gpt_layer_local_spec(qk_layernorm=True, normalization=config.normalization)


def wrong(config):
    return [config]
"""


@pytest.fixture
def specs(tmp_path, monkeypatch):
    (tmp_path / "own_specs.py").write_text(SPECS)
    (tmp_path / "broken_specs.py").write_text("import there_is_no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_specs", None)


def with_spec(args: Arguments, name: str) -> Arguments:
    shape = replace(args.shape, architecture=ArchitectureRecipe(spec=name))
    return replace(args, shape=shape)


def test_replacement_reaches_every_depth_and_changes_nothing_else():
    spec = get_gpt_layer_local_spec(num_experts=2, qk_layernorm=True, normalization="RMSNorm")
    before = repr(spec)
    tree = {"a": [spec, (spec, 3)], "b": ModuleSpec(module=torch.nn.Linear, submodules=spec)}
    made = replace_modules(
        tree, {DotProductAttention: SDPACoreAttention, WrappedTorchNorm: RMSNorm}
    )
    assert repr(spec) == before
    assert made["a"][1][1] == 3
    for layer in (made["a"][0], made["a"][1][0], made["b"].submodules):
        names = repr(layer)
        assert "DotProductAttention" not in names.replace("SDPACoreAttention", "")
        assert "WrappedTorchNorm" not in names
        assert layer.submodules.self_attention.submodules.core_attention is SDPACoreAttention
        assert layer.submodules.self_attention.submodules.q_layernorm is RMSNorm
        assert layer.submodules.pre_mlp_layernorm is RMSNorm
        assert layer.module is spec.module
        assert layer.submodules.self_attention.params == spec.submodules.self_attention.params


PLAIN = {"self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"}
MLA = {"multi_latent_attention": True, "q_lora_rank": 16}
LATENTS = {f"self_attention.linear_{x}_up_proj.layer_norm_weight" for x in ("q", "kv")}


@pytest.mark.parametrize(
    ("architecture", "qk_layernorm", "names"),
    [
        ({}, False, PLAIN),
        (
            {"num_experts": 2},
            False,
            {"self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight"},
        ),
        (MLA, False, {"input_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"}),
        (MLA, True, {"input_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", *LATENTS}),
        (
            {**MLA, "num_experts": 2},
            True,
            {"input_layernorm.weight", "pre_mlp_layernorm.weight", *LATENTS},
        ),
    ],
    ids=["plain", "experts", "latent attention", "its norms", "all of it"],
)
def test_norms_are_saved_under_transformer_engines_names(
    runtime, args, architecture, qk_layernorm, names
):
    """As in Megatron-Core's transformer-engine specs, which fuse them with projections."""
    shape = replace(
        args.shape, architecture=ArchitectureRecipe(**architecture), qk_layernorm=qk_layernorm
    )
    if shape.architecture.multi_latent_attention:
        shape = replace(shape, num_query_groups=shape.num_attention_heads)
    model = build_gpt_model(replace(args, shape=shape))
    saved = {key for key in model.sharded_state_dict() if "norm" in key and "layers.0" in key}
    keys = {value.key for value in model.sharded_state_dict().values() if hasattr(value, "key")}
    assert len(saved) == len(names)
    found = {key.split("layers.")[1] for key in keys if "norm" in key and "layers." in key}
    assert {key.removeprefix("0.").removeprefix("1.") for key in found} == names


@pytest.mark.parametrize(
    ("name", "qk_layernorm"), [("own_specs:layer", False), ("own_specs:by_config", True)]
)
def test_a_spec_of_ones_own_is_built(runtime, args, specs, name, qk_layernorm):
    model = build_gpt_model(with_spec(args, name))
    layer = model.decoder.layers[1].self_attention
    # What is in the spec is built, not replaced; the final norm is ours.
    assert type(layer.core_attention) is DotProductAttention
    assert isinstance(layer.q_layernorm, torch.nn.RMSNorm) == qk_layernorm
    assert type(model.decoder.final_layernorm) is RMSNorm
    assert len(model.decoder.layers) == args.shape.num_layers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_specs", "must read 'module:name'"),
        (":layer", "must read 'module:name'"),
        ("no_specs:layer", "cannot import no_specs.*PYTHONPATH"),
        ("broken_specs:layer", "cannot import broken_specs.*there_is_no_such_module"),
        ("own_specs:nothing", "own_specs has no nothing; it has .*layer"),
        ("own_specs:number", "not int"),
        ("own_specs:wrong", "not list"),
    ],
)
def test_wrong_names_are_explained(runtime, args, specs, name, message):
    config = transformer_config(args)
    with pytest.raises(UserError, match=rf"architecture\.spec='{name}'.*{message}"):
        custom_spec(name, config)


def test_module_by_import_path_is_kept(runtime, args):
    """Megatron-Core may also name a module by where it is to be imported from."""
    spec = ModuleSpec(
        module=("megatron.core.transformer.transformer_layer", "TransformerLayer"),
        submodules=TransformerLayerSubmodules(input_layernorm=WrappedTorchNorm),
    )
    made = replace_modules(spec, {WrappedTorchNorm: RMSNorm, TransformerLayer: RMSNorm})
    assert made.module == spec.module
    assert made.submodules.input_layernorm is RMSNorm
