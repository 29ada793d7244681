"""Defects planted in a distillation, each found by the audit and named; and sound models."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from audited_case import TERMS, Case
from loss_defects import LOSS_DEFECTS
from megatron.core.models.gpt import GPTModel
from model_defects import MODEL_DEFECTS
from transformers import AutoConfig
from variants import VARIANTS

from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape, from_hf_config
from flagscale.models.distillation_audit import AUDITED_LOSS, audit
from flagscale.models.distillation_proof import PROOF_LOSS
from flagscale.models.megatron import build_model, logits
from flagscale.models.random_weights import with_random_weights
from flagscale.post_training.findings import failures

SEQ_LENGTH = 64
DEFECTS = LOSS_DEFECTS | MODEL_DEFECTS


@pytest.fixture(scope="module")
def arguments(teacher: Path, student: Path) -> Iterator[None]:
    args = with_teacher(model_arguments(ModelShape.load(student), SEQ_LENGTH), teacher, PROOF_LOSS)
    with platform.runtime(), use_args(args):
        yield


@pytest.fixture
def case(
    arguments: None, teacher: Path, student: Path, dataset: Path, tmp_path: Path, monkeypatch: Any
) -> Case:
    return Case(teacher, student, dataset, tmp_path, monkeypatch)


def test_a_sound_conversion_passes(case):
    found = case.audit()
    assert [one for one in found if one.verdict != "passed"] == []
    assert len(found) >= 25


def test_a_sound_conversion_with_terms_passes(case):
    case.loss = AUDITED_LOSS.model_copy(update=TERMS)
    found = case.audit()
    assert [one for one in found if one.verdict != "passed"] == []
    assert {"intermediate loss", "attention loss"} <= {one.check for one in found}


def test_the_models_are_what_they_were(case):
    models = {"teacher": case.teacher, "student": case.student}
    before = {name: logits(model, case.batch["tokens"]) for name, model in models.items()}
    hooks = {name: count_hooks(model) for name, model in models.items()}
    case.audit()
    for name, model in models.items():
        assert torch.equal(logits(model, case.batch["tokens"]), before[name])
        assert count_hooks(model) == hooks[name]
        assert not model.training
        assert not [one for one in model.parameters() if one.grad is not None]


def count_hooks(model: GPTModel) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_named(case, name):
    plant, message = DEFECTS[name]
    plant(case)
    found = failures(case.audit())

    assert any(re.search(message, line) for line in found), found


FAMILIES = [
    "llama tied",
    "llama untied, llama3 rope",
    "qwen2 tied",
    "qwen3 untied",
    "mistral untied, wide heads",
    "qwen3_moe untied, rescaled shares",
]


def random_shape(family: str) -> ModelShape:
    values = {
        "vocab_size": 300,  # padded to 384
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return from_hf_config(AutoConfig.for_model(**(values | VARIANTS[family])))


@pytest.mark.parametrize("init", ["depth", "same", "scratch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_found_in_sound_models(family, dtype, init, teacher, arguments):
    """With random weights, whose loss is no better than that of frequencies: a warning."""
    shape = random_shape(family)
    build = partial(build_model, seq_length=32, params_dtype=dtype)
    taught = with_random_weights(partial(build, shape), 5)
    layers = {"depth": [0, 2], "same": [0, 1, 2], "scratch": [0]}[init]
    student_shape = replace(shape, num_layers=len(layers))
    learner = with_random_weights(partial(build, student_shape), 6)
    if init != "scratch":
        theirs = dict(taught.named_parameters())
        for name, parameter in learner.named_parameters():
            kept = re.sub(r"layers\.(\d+)", lambda at: f"layers.{layers[int(at[1])]}", name)
            parameter.data.copy_(theirs[kept])
    tokens = torch.randint(300, (1, 33), generator=torch.Generator().manual_seed(1))
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(1, 32),
        "position_ids": torch.arange(32)[None],
    }
    args = model_arguments(student_shape, 32, params_dtype=dtype)
    with use_args(with_teacher(args, teacher, PROOF_LOSS)):
        found = audit(learner, taught, batch, unigram=5.0).findings
    wrong = [one for one in found if one.verdict not in ("passed", "not run")]
    assert [(one.check, one.verdict) for one in wrong] == [("teacher's loss", "warning")], wrong
