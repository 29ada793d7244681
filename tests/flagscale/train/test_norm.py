"""Norms alone, and their gradients on two tensor-parallel processes."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from flagscale import platform
from flagscale.checkpoint import load_weights, save_weights
from flagscale.models.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe, ParallelismRecipe
from flagscale.train.arguments import Arguments
from flagscale.train.global_vars import use_args
from flagscale.train.norm import NORMS
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
}
TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "sequence_parallel": True}
LAYOUTS = {key: [TENSOR, SEQUENCE] for key in ARCHITECTURES}
LAYOUTS |= {"experts": [SEQUENCE], "linear block": [TENSOR]}  # the others are refused


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_it_is_torchs_norm_with_a_mark(kind, sequence_parallel):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        normalization=kind,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
    )
    norm = NORMS[kind](config=config, hidden_size=16, eps=1e-3)
    config.sequence_parallel = False
    theirs = WrappedTorchNorm(config=config, hidden_size=16, eps=1e-3)
    assert isinstance(norm, type(theirs))
    with torch.no_grad():
        for ours, other in zip(norm.parameters(), theirs.parameters(), strict=True):
            ours.copy_(other.normal_())
    x = torch.randn(5, 3, 16)
    assert torch.equal(norm(x), theirs(x))
    assert {p.sequence_parallel for p in norm.parameters()} == {sequence_parallel}


def gradients(name: str, layout: dict, weights: Path) -> dict[str, torch.Tensor]:
    """Gradients of the parameters that every rank has whole, after Megatron-Core's reductions."""
    shape = replace(SHAPE, architecture=ArchitectureRecipe(**ARCHITECTURES[name]))
    args = Arguments(shape=shape, seq_length=16, parallelism=ParallelismRecipe(**layout))
    tokens = torch.arange(32).reshape(2, 16) * 37 % 120
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
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        wrapped.zero_grad_buffer()
        positions, labels = torch.arange(16).expand(2, 16), tokens.roll(-1, 1)
        wrapped(tokens, positions, None, labels=labels).sum().backward()
        finalize_model_grads([wrapped])
    return {
        name: parameter.main_grad.clone()
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    }


def tensor_parallel_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with platform.runtime(parallelism=ParallelismRecipe(**TENSOR)):
        found = {
            (name, index): gradients(name, layout, folder / name)
            for name, layouts in LAYOUTS.items()
            for index, layout in enumerate(layouts)
        }
    torch.save(found, folder / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_tensor_parallel_ranks_have_the_gradients_of_one(runtime, tmp_path):
    """With and without sequence parallelism; norms on heads, hidden states and latents alike."""
    alone = {name: gradients(name, {}, tmp_path / name) for name in ARCHITECTURES}
    mp.spawn(tensor_parallel_rank, (free_port(), tmp_path), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for (name, index), values in found.items():
            norms = [key for key in values if "norm" in key]
            assert norms
            assert set(values) <= set(alone[name])
            for key, value in values.items():
                scale = alone[name][key].abs().max().item()
                torch.testing.assert_close(
                    value,
                    alone[name][key],
                    rtol=0,
                    atol=1e-5 * scale,
                    msg=lambda text, where=(name, index, key): f"{where}: {text}",
                )
