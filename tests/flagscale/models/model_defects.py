"""Defects in models: in their weights, in how they run, in whose tokens they read."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from audited_case import Case, Plant, after_conversion, apart, with_terms
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint import save_weights
from flagscale.models.megatron import WEIGHTS
from flagscale.post_training.intermediate_terms import intermediate_terms


def stays_in_training(model: Any, teacher: GPTModel) -> None:
    teacher.eval = lambda: teacher.train()


def drops_out(model: Any, teacher: GPTModel) -> None:
    norm = teacher.decoder.final_layernorm
    norm.register_forward_hook(lambda *a: torch.nn.functional.dropout(a[2], 0.1))


def keeps_a_gradient(model: Any, teacher: GPTModel) -> None:
    weight = teacher.decoder.final_layernorm.weight
    weight.grad = torch.ones_like(weight)


def not_causal(case: Case) -> None:
    right = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **named: Any) -> torch.Tensor:
        return right(*args, **{**named, "is_causal": False})

    case.patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


def weight(whose: str, name: str, change: Callable[[torch.Tensor], object]) -> Plant:
    return lambda case: change(getattr(case, whose).get_parameter(name).data)


def set_nan(value: torch.Tensor) -> None:
    value[3, 5] = float("nan")


def in_the_artifact(plant: Plant) -> Plant:
    """What was read is what is stored, and that is wrong."""

    def planted(case: Case) -> None:
        plant(case)
        copy = case.folder / "teacher"
        shutil.copytree(case.artifacts.teacher, copy, ignore=shutil.ignore_patterns(WEIGHTS))
        save_weights(case.teacher, copy / WEIGHTS)
        case.artifacts = replace(case.artifacts, teacher=copy)

    return planted


def rows_in_another_order(value: torch.Tensor) -> None:
    value.copy_(value.roll(7, 0))


def untied(case: Case) -> None:
    own = case.student.embedding.word_embeddings.weight.detach().clone().requires_grad_()
    case.student.shared_embedding_or_output_weight = lambda: own


def padding_in_the_softmax(case: Case) -> None:
    apart(case)
    for model in (case.student, case.teacher):
        model.output_layer._forward_hooks.clear()
        with torch.no_grad():  # padding that nobody masks is not 0
            model.embedding.word_embeddings.weight[1000:] = 0.1


def other_tokenizer(case: Case) -> None:
    for name in ("tokens", "labels"):
        case.batch[name] = (case.batch[name] * 7 + 300) % 1000


def other_layers(case: Case) -> None:
    first, second = case.student.decoder.layers
    first.load_state_dict(second.state_dict())


def stored_in_bf16(case: Case) -> None:
    save_weights(case.student, case.folder / "saved" / WEIGHTS, torch.bfloat16)
    case.artifacts = replace(case.artifacts, student=case.folder / "saved")


def projection(first: int, last: int) -> Plant:
    """Of the pair of hidden states, another than its widths need."""

    def plant(model: Any, teacher: GPTModel) -> None:
        terms = intermediate_terms(model)
        terms.projections["0"] = torch.nn.Linear(first, last)

    return with_terms(after_conversion(plant))


def frozen_part(case: Case) -> None:
    case.student.decoder.layers[0].mlp.linear_fc1.weight.requires_grad_(False)


NORM = "decoder.final_layernorm.weight"
LAYER_NORM = "decoder.layers.1.input_layernorm.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"
MODEL_DEFECTS: dict[str, tuple[Plant, str]] = {
    "student's norm not loaded": (
        weight("student", LAYER_NORM, lambda w: w.fill_(1)),
        r"student's .*layer_norm_weight in memory is not what its artifact holds: .* not loaded",
    ),
    "teacher's norm not loaded": (
        weight("teacher", NORM, lambda w: w.fill_(1)),
        r"teacher's .*final_layernorm.weight in memory is not what its artifact holds",
    ),
    "teacher in training mode": (after_conversion(stays_in_training), "is in training mode"),
    "teacher's dropout": (after_conversion(drops_out), "differ by .* dropout is on"),
    "teacher trainable": (
        after_conversion(lambda model, teacher: teacher.requires_grad_(True)),
        "the teacher beside the student is trainable",
    ),
    "teacher's gradient kept": (
        after_conversion(keeps_a_gradient),
        "teacher's decoder.final_layernorm.weight got a gradient: it would not stay",
    ),
    "attention not causal": (not_causal, "student's hidden states change .* is not causal"),
    "vocabulary rows permuted": (
        in_the_artifact(weight("teacher", EMBEDDING, rows_in_another_order)),
        "teacher's loss is .* its weights are broken .* rows in another order",
    ),
    "layer zeroed": (weight("student", FC2, lambda w: w.zero_()), "student's .* is all zero"),
    "NaN": (weight("teacher", FC2, set_nan), "teacher's .*linear_fc2.weight holds .* not finite"),
    "tied weights untied": (untied, "student's output layer has weights of its own"),
    "padding in the softmax": (padding_in_the_softmax, "with the padding of the vocabulary in the"),
    "wrong tokenizer": (other_tokenizer, "data were made with another tokenizer"),
    "other layers kept": (other_layers, "student's .* is not the teacher's .*layers.0"),
    "stored in another dtype": (stored_in_bf16, "stored in torch.bfloat16, not in torch.float32"),
    "projection from a wrong size": (
        projection(24, 64),
        "mse of .*: 64 channels of the student need a projection to 64 .* is one from 24 to 64",
    ),
    "projection to one channel": (projection(64, 1), "but there is one from 64 to 1"),
    "part of the student frozen": (frozen_part, "student's .*linear_fc1.weight got no gradient"),
}
