"""One rank of gradients of every architecture: `torchrun --nproc-per-node 2 ... FOLDER`.

Two ranks are tensor-parallel first, then context-parallel. FOLDER holds the architectures' weights;
each rank leaves in it what it found. See `test_architecture_layouts.py`.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from flagscale.checkpoint import load_weights, save_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe, ParallelismRecipe
from flagscale.train.train_gpt import model_provider

SHAPE = ModelShape(
    model_type="llama",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=120,
    padded_vocab_size=128,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    qk_layernorm=True,
)
ARCHITECTURES = {
    "RMSNorm": {},
    "LayerNorm": {"normalization": "LayerNorm"},
    "experts": {"num_experts": 2, "moe_shared_expert_intermediate_size": 32},
    "heterogeneous": {
        "heterogeneous_layers_config": {
            "block_configs": [
                {"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 48}},
                {"attention": {"num_query_groups": 4}, "mlp": {"no_op": True}},
            ]
        }
    },
    "linear block": {
        "heterogeneous_layers_config": {
            "block_configs": [
                {"attention": {"replace_with_linear": True}, "mlp": {"ffn_hidden_size": 48}},
                {"attention": {"num_query_groups": 4}, "mlp": {"replace_with_linear": True}},
            ]
        }
    },
    "multi-token prediction": {"mtp_num_layers": 1},
    "latent attention": {
        "multi_latent_attention": True,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
    },
}
TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "sequence_parallel": True}
CONTEXT = {"context_parallel_size": 2}
LAYOUTS = {key: [TENSOR, SEQUENCE] for key in ARCHITECTURES}
# The others are refused.
EXPERTS = {**SEQUENCE, "expert_model_parallel_size": 2}
LAYOUTS |= {"experts": [EXPERTS], "linear block": [TENSOR], "latent attention": []}


def gradients(name: str, layout: dict, weights: Path) -> dict[str, torch.Tensor]:
    """Gradients of the parameters that every rank has whole, after Megatron-Core's reductions."""
    shape = replace(SHAPE, architecture=ArchitectureRecipe(**ARCHITECTURES[name]))
    if shape.architecture.multi_latent_attention:
        shape = replace(shape, num_query_groups=4)
    args = Arguments(shape=shape, seq_length=16, parallelism=ParallelismRecipe(**layout))
    with use_args(args):
        model = model_provider()
        if layout:
            load_weights(model, weights)
        else:
            torch.manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)
            save_weights(model, weights)
        config = DistributedDataParallelConfig()
        wrapped = DistributedDataParallel(model.config, config, model)
        wrapped.zero_grad_buffer()
        tokens, labels, positions = (own_halves(x) for x in batch())
        wrapped(tokens, positions, None, labels=labels).sum().backward()
        finalize_model_grads([wrapped])
    split = "tensor_model_parallel_size" in layout
    return {
        name: parameter.main_grad.clone()
        for name, parameter in model.named_parameters()
        if not (split and getattr(parameter, "tensor_model_parallel", False))
        and not (layout == EXPERTS and "local_experts" in name)
    }


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and positions."""
    tokens = torch.arange(32).reshape(2, 16) * 37 % 120
    return tokens, tokens.roll(-1, 1), torch.arange(16).expand(2, 16)


def own_halves(x: torch.Tensor) -> torch.Tensor:
    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    chunks = x.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1) if size > 1 else x


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for group in (TENSOR, CONTEXT):
        with platform.runtime(parallelism=ParallelismRecipe(**group)):
            for name in ARCHITECTURES:
                for layout in LAYOUTS[name] if group is TENSOR else [CONTEXT]:
                    found[name, str(layout)] = gradients(name, layout, folder / name)
            rank = torch.distributed.get_rank()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
