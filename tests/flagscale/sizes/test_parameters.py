"""Parameters that are counted, against those that Megatron-Core builds and the Hub's own counts."""

from dataclasses import replace

import pytest
from shapes import EXPERTS, LATENT, TEACHER

from flagscale.megatron import platform
from flagscale.models.megatron import build_model
from flagscale.recipe import ArchitectureRecipe
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import active_parameters, parameters
from flagscale.sizes.teacher import known_models, shape_of

LATENT_QUERIES = LATENT.model_copy(update={"q_lora_rank": 16})
SHAPES = {
    "tied": TEACHER,
    "untied": replace(TEACHER, untie_embeddings_and_output_weights=True),
    "norms on heads": replace(TEACHER, qk_layernorm=True),
    "biases": replace(TEACHER, add_qkv_bias=True),
    "LayerNorm": replace(
        TEACHER, qk_layernorm=True, architecture=ArchitectureRecipe(normalization="LayerNorm")
    ),
    "experts": replace(TEACHER, architecture=EXPERTS),
    "experts in every second layer": replace(
        TEACHER, architecture=EXPERTS.model_copy(update={"moe_layer_freq": 2})
    ),
    "latent attention": replace(TEACHER, num_query_groups=8, architecture=LATENT),
    "latent queries": replace(
        TEACHER, num_query_groups=8, qk_layernorm=True, architecture=LATENT_QUERIES
    ),
    "multi-token prediction": replace(
        TEACHER,
        untie_embeddings_and_output_weights=True,
        architecture=ArchitectureRecipe(mtp_num_layers=2),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_one_process_holds_what_is_built(name):
    with platform.runtime():
        built = sum(parameter.numel() for parameter in build_model(SHAPES[name], 64).parameters())
    assert parameters(SHAPES[name]).total == built


@pytest.mark.parametrize("source", known_models())
def test_known_models_have_the_hubs_number_of_parameters(source):
    known = known_models()[source]
    assert parameters(shape_of(known["config"])).total == known["parameters"]


def test_a_mixture_multiplies_a_token_by_its_share_of_the_experts():
    # "3.3B activated" in Qwen3-30B-A3B's model card, embedding included.
    shape = shape_of(known_models()["Qwen/Qwen3-30B-A3B"]["config"])
    embedding = shape.vocab_size * shape.hidden_size
    assert (active_parameters(shape) + embedding) / 1e9 == pytest.approx(3.3, abs=0.06)


def test_stages_and_ranks_share_the_parameters():
    shape = SHAPES["untied"]
    split = Layout(tensor=2, pipeline=2)
    norms = 2 * shape.hidden_size * shape.num_layers + shape.hidden_size
    ranks = 2 * sum(parameters(shape, split, stage).total for stage in (0, 1))
    assert ranks == parameters(shape).total + norms  # each norm is whole on both tensor ranks
    tied = sum(parameters(TEACHER, Layout(pipeline=2), stage).total for stage in (0, 1))
    table = TEACHER.padded_vocab_size * TEACHER.hidden_size
    assert tied == parameters(TEACHER).total + table  # the last stage has a copy
