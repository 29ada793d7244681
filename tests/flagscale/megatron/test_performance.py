"""What `auto` comes to: almost nothing on a CPU; on a GPU, what the model and its layers allow."""

import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from types import ModuleType

import pytest
import torch

from flagscale.errors import UserError
from flagscale.megatron import performance, platform
from flagscale.megatron.arguments import Arguments, training_arguments
from flagscale.megatron.fp8 import check_fp8_device, check_fp8_sizes
from flagscale.megatron.shape import ModelShape
from flagscale.megatron.transformer_config import transformer_config
from flagscale.megatron.user_buffers import user_buffers
from flagscale.recipe import ArchitectureRecipe, ParallelismRecipe, TrainingRecipe

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
ON = {*SWITCHES} - {"tp_comm_overlap"}  # by `auto`, where all is right
SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


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
def test_gradients_are_accumulated_in_place_on_a_cpu_and_all_else_is_off():
    assert len(SWITCHES) == 8
    assert on(performance.resolved(training(), SHAPE)) == {"gradient_accumulation_fusion"}


def test_all_is_on_on_a_gpu_where_it_is_right(gpu):
    assert on(performance.resolved(training(), SHAPE)) == ON
    distilled = performance.resolved(training(), SHAPE, distilled=True)
    assert ON - on(distilled) == {"cross_entropy_loss_fusion"}
    latent = performance.resolved(training(), replace(SHAPE, architecture=LATENT))
    assert ON - on(latent) == {"apply_rope_fusion"}
    whole = training(parallelism={"use_distributed_optimizer": False})
    assert ON - on(performance.resolved(whole, SHAPE)) == {"overlap_param_gather"}


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


def test_overlap_of_tensor_parallel_ranks_is_on_where_it_is_asked_for(gpu):
    section = training(tp_comm_overlap=True, parallelism=SPLIT)
    assert performance.resolved(section, SHAPE, distilled=True).tp_comm_overlap is True
    assert performance.resolved(training(parallelism=SPLIT), SHAPE).tp_comm_overlap is False


def test_megatron_core_is_told_of_the_overlap():
    args = Arguments(SHAPE, 64, parallelism=ParallelismRecipe(**SPLIT))
    assert not transformer_config(args).tp_comm_overlap
    assert transformer_config(replace(args, tp_comm_overlap=True)).tp_comm_overlap


@pytest.mark.parametrize(
    ("values", "architecture", "lacks"),
    [
        ({"fp8": "hybrid"}, {}, "fp8=none"),
        ({"precision": "fp32"}, {}, "precision=bf16"),
        ({}, {"num_experts": 4}, "plain layers of attention and MLP"),
        ({}, {"multi_latent_attention": True}, "plain layers of attention and MLP"),
        ({}, {"mtp_num_layers": 1}, "plain layers of attention and MLP"),
    ],
)
def test_overlap_of_tensor_parallel_ranks_needs(gpu, values, architecture, lacks):
    section = training(tp_comm_overlap=True, parallelism=SPLIT, **values)
    shape = replace(SHAPE, architecture=ArchitectureRecipe(**architecture))
    with pytest.raises(UserError, match=rf"training\.tp_comm_overlap=true needs {lacks}"):
        performance.resolved(section, shape)


class Buffers(ModuleType):
    """What is called of transformer-engine, which needs GPUs: it notes it, or has no multicast."""

    UserBufferQuantizationMode = Enum("UserBufferQuantizationMode", ["NONE", "FP8"])

    def __init__(self, has_multicast: bool = True) -> None:
        super().__init__("transformer_engine.pytorch.module.base")
        self.has_multicast, self.calls = has_multicast, []

    def initialize_ub(self, **arguments) -> None:
        assert self.has_multicast, "does not support CUDA Multicast"
        self.calls.append(arguments)

    def destroy_ub(self) -> None:
        self.calls.append("destroyed")


@pytest.fixture
def buffers(monkeypatch) -> Callable[..., Buffers]:
    def install(**given) -> Buffers:
        base, module = Buffers(**given), ModuleType("transformer_engine.pytorch.module")
        module.base = base
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return base

    return install


def test_user_buffers_have_the_shape_of_what_the_ranks_share(buffers):
    """As transformer-engine 2.7 to 2.11 take it."""
    base = buffers()
    parallelism = ParallelismRecipe(**SPLIT, context_parallel_size=2)
    args = Arguments(SHAPE, 64, 3, params_dtype=torch.bfloat16, parallelism=parallelism)
    with user_buffers(args):
        assert base.calls == []
    with user_buffers(replace(args, tp_comm_overlap=True)):
        (asked,) = base.calls
    assert base.calls[1:] == ["destroyed"]
    assert asked == {
        "shape": [96, 64],
        "tp_size": 2,
        "quantization_modes": [base.UserBufferQuantizationMode.NONE],
        "dtype": torch.bfloat16,
        "bootstrap_backend": "nccl",
    }


def test_a_machine_without_multicast_is_told_of_it(buffers):
    buffers(has_multicast=False)
    args = Arguments(SHAPE, 64, parallelism=ParallelismRecipe(**SPLIT), tp_comm_overlap=True)
    with pytest.raises(UserError, match=r"tp_comm_overlap=true.*does not support CUDA Multicast"):
        user_buffers(args).__enter__()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp_comm_overlap": True}, r"needs parallelism\.sequence_parallel=true"),
        (
            {"tp_comm_overlap": True, "parallelism": SPLIT, "transformer_impl": "local"},
            "tp_comm_overlap=true with transformer_impl=local",
        ),
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
