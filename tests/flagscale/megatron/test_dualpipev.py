"""Every rank's two chunks, built one after the other in one process."""

from dataclasses import replace

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType

from flagscale.megatron.arguments import Arguments
from flagscale.megatron.dualpipev import DualPipeVLayout
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe, ParallelismRecipe
from flagscale.train.train_gpt import model_provider

SHAPE = ModelShape(
    model_type="llama",
    num_layers=8,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=128,
    padded_vocab_size=128,
    max_position_embeddings=32,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    untie_embeddings_and_output_weights=True,
)


def arguments(size: int = 2, **architecture) -> Arguments:
    return Arguments(
        shape=replace(SHAPE, architecture=ArchitectureRecipe(**architecture)),
        seq_length=16,
        parallelism=ParallelismRecipe(pipeline_model_parallel_size=size),
        use_dualpipev=True,
    )


@pytest.fixture
def as_rank(runtime):
    """Lets the process pass for a pipeline rank."""
    yield parallel_state.set_pipeline_model_parallel_rank
    parallel_state.set_pipeline_model_parallel_rank(None)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"num_experts": 2, "moe_layer_freq": 3},
        {
            "heterogeneous_layers_config": {
                "block_configs": [
                    {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 16 + 8 * i}}
                    for i in range(8)
                ]
            }
        },
    ],
    ids=["dense", "experts", "heterogeneous"],
)
def test_every_layer_is_built_once_and_where_it_belongs(as_rank, size, architecture):
    built, ends, n = {}, [], 8 // (2 * size)
    for rank in range(size):
        as_rank(rank)
        for first in (True, False):
            pre_process, post_process = rank == 0 and first, rank == 0 and not first
            with use_args(arguments(size, **architecture)):
                chunk = model_provider(pre_process, post_process, is_dualpipev_first_chunk=first)
            numbers = [layer.layer_number for layer in chunk.decoder.layers]
            start = rank * n if first else 8 - (rank + 1) * n
            assert numbers == list(range(start + 1, start + n + 1))
            built |= dict(zip(numbers, chunk.decoder.layers, strict=True))
            ends.append((hasattr(chunk, "embedding"), hasattr(chunk, "output_layer")))
            assert (chunk.decoder.final_layernorm is not None) == post_process
    assert sorted(built) == list(range(1, 9))
    assert ends[:2] == [(True, False), (False, True)]
    assert set(ends[2:]) == {(False, False)}
    if "num_experts" in architecture:
        experts = [number for number in built if hasattr(built[number].mlp, "experts")]
        assert sorted(experts) == [1, 4, 7]
    if "heterogeneous_layers_config" in architecture:
        widths = [built[i].mlp.linear_fc2.weight.size(1) for i in range(1, 9)]
        assert widths == [16 + 8 * i for i in range(8)]


def test_layout_counts_every_kind_of_layer():
    layouts = [DualPipeVLayout(8, 2, first) for first in (True, False)]
    chunks = [layout.chunk(rank) for rank in range(2) for layout in layouts]
    assert sum(chunk.count(LayerType.embedding) for chunk in chunks) == 1
    assert sum(chunk.count(LayerType.loss) for chunk in chunks) == 1
    assert [layouts[0].get_layer_offset(pp_rank=r) for r in range(2)] == [0, 2]
    assert [layouts[1].get_layer_offset(pp_rank=r) for r in range(2)] == [6, 4]


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({}, {"pre_process": False}, "pipeline rank 0 has pre_process=True, post_process=False"),
        ({}, {"is_dualpipev_first_chunk": False}, "second chunk of pipeline rank 0"),
        ({}, {"vp_stage": 0}, "vp_stage=0"),
        ({"parallelism": ParallelismRecipe()}, {}, "pipeline_model_parallel_size=1"),
        ({"use_legacy_models": True}, {}, "use_legacy_models=True"),
        (
            {"shape": replace(SHAPE, untie_embeddings_and_output_weights=False)},
            {},
            "untie_embeddings_and_output_weights=False",
        ),
        (
            {"shape": replace(SHAPE, architecture=ArchitectureRecipe(mtp_num_layers=1))},
            {},
            "mtp_num_layers=1",
        ),
        ({"shape": replace(SHAPE, num_layers=6)}, {}, "num_layers=6.*multiple of 2 x 2"),
        ({"use_dualpipev": False}, {}, "use_dualpipev=False"),
    ],
)
def test_what_cannot_be_placed_is_refused(as_rank, changes, call, message):
    as_rank(0)
    call = {"post_process": False, "is_dualpipev_first_chunk": True} | call
    with (
        use_args(replace(arguments(), **changes)),
        pytest.raises(ValueError, match=message),
    ):
        model_provider(**call)
