"""One rank of the tests in test_layers.py, and the models that they cut."""

from dataclasses import replace
from pathlib import Path

from checkpoint_shape import SHAPE

from flagscale.checkpoint import load_layers, save_weights
from flagscale.megatron import platform
from flagscale.models.megatron import build_model
from flagscale.recipe import ArchitectureRecipe, ModelsRecipe

KEPT = (1, 2, 3, 5)
DEEP = 6
BLOCK = {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 64}}
NARROW = {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 32}}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 16}


def shapes(name: str):
    """The deeper model's, and that of what is kept of it."""
    deep = replace(SHAPE, num_layers=DEEP)
    if name == "untied, biases, q and k norms":
        deep = replace(
            deep,
            untie_embeddings_and_output_weights=True,
            add_qkv_bias=True,
            qk_layernorm=True,
            padded_vocab_size=256,
        )
    if name == "experts":
        deep = replace(deep, architecture=ArchitectureRecipe(**EXPERTS))
    student = replace(deep, num_layers=len(KEPT))
    if name == "layers that differ":
        blocks = [BLOCK, NARROW] * 3
        deep, student = (
            replace(
                shape,
                architecture=ArchitectureRecipe(
                    heterogeneous_layers_config={"block_configs": [blocks[i] for i in layers]}
                ),
            )
            for shape, layers in ((deep, range(DEEP)), (student, KEPT))
        )
    return deep, student


def cut_on_rank(weights: Path, model: str, layouts: dict[str, ModelsRecipe], output: Path) -> None:
    """Save what each layout makes of the deeper model's weights."""
    deep, student = shapes(model)
    for name, models in layouts.items():
        with platform.runtime(seed=2, parallelism=models.sizes):
            chunk = build_model(student, 16, models.sizes)
            load_layers(chunk, weights, KEPT, deep.num_layers)
            save_weights(chunk, output / name)
