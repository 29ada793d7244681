"""One batch, and float64 references from transformers."""

from dataclasses import dataclass

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from transformers import AutoModelForCausalLM

from flagscale.data.loader import train_iterator
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.shape import ModelShape


@pytest.fixture(autouse=True)
def fresh_scale():
    """Megatron-Core keeps the balance loss' scale, of the shape of whoever used it first."""
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="module")
def batch(runtime, dataset, tmp_path_factory):
    """Two packed samples, with a mask that leaves out a third of the positions."""
    cache = tmp_path_factory.mktemp("cache")
    values = next(train_iterator(dataset, cache, micro_batch_size=2, global_batch_size=2, seed=1))
    mask = torch.rand(values["loss_mask"].shape, generator=torch.Generator().manual_seed(0)) > 1 / 3
    return {**values, "loss_mask": mask.float()}


@pytest.fixture(scope="module")
def args(student, batch):
    return Arguments(
        shape=ModelShape.load(student),
        seq_length=batch["tokens"].size(1),
        micro_batch_size=2,
        global_batch_size=2,
    )


@dataclass
class Reference:
    """Float64 models of transformers, the student with the teacher's layers 0 and 3."""

    teacher: torch.nn.Module
    student: torch.nn.Module


@pytest.fixture
def reference(tiny_teacher):
    def load(keep=None):
        model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float64).eval()
        # Here it is the end-of-document token: an input like others, with a gradient like others.
        model.model.embed_tokens.padding_idx = None
        if keep:
            model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in keep)
            for index, layer in enumerate(model.model.layers):
                layer.self_attn.layer_idx = index
            model.config.num_hidden_layers = len(keep)
        return model

    return Reference(load(), load((0, 3)))
