"""One rank of the tests in test_padded_vocabulary.py."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from transformers import AutoConfig

from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import from_hf_config
from flagscale.models.causal_lm import CausalLM
from flagscale.models.megatron import build_model, logits
from flagscale.models.random_weights import with_random_weights
from flagscale.post_training.conversion import convert_for_distillation
from flagscale.recipe import DistillationRecipe, ModelsRecipe
from flagscale.train.batches import reads_data
from flagscale.train.schedule import reduce_reports, run_schedule

SEQ_LENGTH = 16
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "teacher": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "student": {"model_type": "qwen3", "head_dim": 16, "rms_norm_eps": 1e-6},
}


def distil_on_rank(
    vocab_size: int, padding: float, distillation: dict[str, Any], models: ModelsRecipe
) -> dict[str, Any]:
    """One step of a Llama that teaches a Qwen3, with this in every row that is no token."""
    with platform.runtime(parallelism=models.sizes):
        built = {name: _model(name, vocab_size, padding, models) for name in FAMILIES}
        student, teacher = built["student"][0], built["teacher"][0]
        recipe = DistillationRecipe(**distillation)
        args = model_arguments(built["student"][1], SEQ_LENGTH, parallelism=models.sizes)
        batch = _batch(vocab_size)
        predicted = {n: logits(model, batch["tokens"]).tolist() for n, (model, _) in built.items()}
        next_token = CausalLM(student, can_cache=False).next_tokens(
            batch["tokens"], [SEQ_LENGTH - 1]
        )
        with use_args(with_teacher(args, Path("teacher"), recipe)):
            teacher.requires_grad_(False)
            model = convert_for_distillation(student, teacher, recipe)
            model.train()
            batches = iter([batch]) if reads_data(args) else None
            reports = reduce_reports(run_schedule([model], [batches], 1))
        return {
            "reports": reports,
            "logits": predicted,
            "next token": next_token,
            "gradients": {
                name: parameter.grad.double().square().sum().item()
                for name, parameter in student.named_parameters()
                if not name.startswith("_teacher_model")
            },
            "of padding": _of_padding(student, vocab_size),
        }


def _model(
    name: str, vocab_size: int, padding: float, models: ModelsRecipe
) -> tuple[GPTModel, Any]:
    config = AutoConfig.for_model(**SIZES, **FAMILIES[name], vocab_size=vocab_size)
    shape = from_hf_config(config)

    def build() -> GPTModel:
        return build_model(shape, SEQ_LENGTH, models.sizes)

    model = with_random_weights(build, 5 + len(name))
    with torch.no_grad():
        for table in (model.embedding.word_embeddings.weight, model.output_layer.weight):
            table.mul_(10)
            table[_first_of_padding(table, vocab_size) :] = padding
    return model, shape


def _batch(vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (1, SEQ_LENGTH + 1), generator=generator)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(1, SEQ_LENGTH),
        "position_ids": torch.arange(SEQ_LENGTH)[None],
    }


def _of_padding(model: GPTModel, vocab_size: int) -> float:
    """The largest gradient of a row that is no token, on any rank."""
    largest = torch.zeros(())
    for table in (model.embedding.word_embeddings.weight, model.output_layer.weight):
        rows = table.grad[_first_of_padding(table, vocab_size) :]
        largest = max(largest, rows.abs().max()) if len(rows) else largest
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest.item()


def _first_of_padding(table: torch.Tensor, vocab_size: int) -> int:
    """On this rank."""
    return max(vocab_size - get_tensor_model_parallel_rank() * table.size(0), 0)
