"""What `auto` comes to: nothing on a CPU; on a GPU, what the model and its layers allow."""

from dataclasses import replace

import pytest

from flagscale.errors import UserError
from flagscale.megatron import performance, platform
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.fp8 import check_fp8_device, check_fp8_sizes
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe, TrainingRecipe

SHAPE = ModelShape(
    model_type="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=128,
    padded_vocab_size=128,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)
LATENT = ArchitectureRecipe(multi_latent_attention=True)
SWITCHES = [
    name
    for name, one in TrainingRecipe.model_fields.items()
    if one.default == "auto" and bool in getattr(one.annotation, "__args__", ())
]


def training(**values) -> TrainingRecipe:
    return TrainingRecipe(train_iters=1, lr=1e-3, **values)


def on(section: TrainingRecipe) -> set[str]:
    return {name for name in SWITCHES if getattr(section, name)}


@pytest.fixture
def gpu(monkeypatch):
    """The decisions of a machine with a GPU and transformer-engine; nothing is run there."""
    monkeypatch.setattr(platform, "HAS_GPU", True)
    monkeypatch.setattr(platform, "transformer_impl", lambda choice: "transformer_engine")
    monkeypatch.setattr(platform, "device", lambda: "cuda:0")


@pytest.mark.skipif(platform.HAS_GPU, reason="is about machines without a GPU")
def test_all_is_off_on_a_cpu():
    assert len(SWITCHES) == 7
    found = performance.resolved(training(), SHAPE)
    assert {name: getattr(found, name) for name in SWITCHES} == dict.fromkeys(SWITCHES, False)


def test_all_is_on_on_a_gpu_where_it_is_right(gpu):
    assert on(performance.resolved(training(), SHAPE)) == set(SWITCHES)
    distilled = performance.resolved(training(), SHAPE, distilled=True)
    assert set(SWITCHES) - on(distilled) == {"cross_entropy_loss_fusion"}
    latent = performance.resolved(training(), replace(SHAPE, architecture=LATENT))
    assert set(SWITCHES) - on(latent) == {"apply_rope_fusion"}
    whole = training(parallelism={"use_distributed_optimizer": False})
    assert set(SWITCHES) - on(performance.resolved(whole, SHAPE)) == {"overlap_param_gather"}


def test_what_is_off_stays_off(gpu):
    section = training(**dict.fromkeys(SWITCHES, False))
    assert performance.resolved(section, SHAPE) == section


def test_resolved_twice_is_resolved_once(gpu):
    once = performance.resolved(training(), SHAPE, distilled=True)
    assert performance.resolved(once, SHAPE, distilled=True) == once


@pytest.mark.skipif(platform.HAS_GPU, reason="is about machines without a GPU")
@pytest.mark.parametrize(
    "values",
    [
        {"apply_rope_fusion": True},
        {"cross_entropy_loss_fusion": True},
        {"gradient_accumulation_fusion": True},
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
        {"overlap_param_gather": True, "parallelism": {"use_distributed_optimizer": True}},
        {"ddp_bucket_size": 10},
    ],
)
def test_what_a_cpu_cannot_is_refused_by_name(values):
    name = next(name for name in reversed(values) if name != "parallelism")
    with pytest.raises(UserError, match=rf"training\.{name}="):
        training_arguments(SHAPE, 64, training(**values))


def test_fused_cross_entropy_is_refused_with_a_teacher(gpu):
    section = training(cross_entropy_loss_fusion=True)
    with pytest.raises(UserError, match=r"needs distillation\.loss=none"):
        performance.resolved(section, SHAPE, distilled=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recompute_modules": ["mlp"]}, "recompute_granularity=none"),
        ({"overlap_param_gather": True, "overlap_grad_reduce": False}, "overlap_grad_reduce=true"),
        ({"apply_rope_fusion": True, "transformer_impl": "local"}, "transformer_impl=local"),
        (
            {
                "overlap_param_gather": True,
                "parallelism": {"use_distributed_optimizer": False},
            },
            "use_distributed_optimizer=true",
        ),
    ],
)
def test_what_no_machine_can_is_refused_when_read(values, message):
    with pytest.raises(ValueError, match=message):
        training(**values)


def test_fp8_needs_its_gpu():
    args = training_arguments(SHAPE, 64, training(fp8="hybrid", fp8_recipe="mxfp8"))
    check_fp8_device(args, (10, 0))
    with pytest.raises(UserError, match=r"fp8_recipe=mxfp8 needs .* 10\.0 .* has 9\.0"):
        check_fp8_device(args, (9, 0))
    check_fp8_device(replace(args, fp8_recipe="delayed"), (8, 9))
    with pytest.raises(UserError, match=r"has 8\.0"):
        check_fp8_device(replace(args, fp8_recipe="delayed"), (8, 0))


def test_blocks_that_are_gathered_are_whole():
    parallelism = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    section = training(fp8="hybrid", fp8_recipe="blockwise", parallelism=parallelism)
    args = training_arguments(SHAPE, 64, section)
    with pytest.raises(UserError, match="hidden_size = 64 must be a multiple of 128"):
        check_fp8_sizes(args)
