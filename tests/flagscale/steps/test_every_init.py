"""Random models of every family through every `student.init`, and out of it into transformers.

By the functions of the steps, without their proofs: the tests of the steps have those.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flagscale.artifacts import new_artifact, read_manifest
from flagscale.checkpoint import save_weights
from flagscale.checkpoint.stored import StoredTensors
from flagscale.megatron.arguments import model_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.models.hf_description import write_config
from flagscale.models.hf_export import write_weights
from flagscale.models.hf_weights import WeightMap
from flagscale.models.megatron import WEIGHTS, build_model, load_model, logits
from flagscale.models.pretrained import Pretrained, describe, open_pretrained
from flagscale.models.source import load_hf_config
from flagscale.models.student_shape import student_shape
from flagscale.models.targets import meet_targets
from flagscale.recipe import SourceRecipe, StudentRecipe
from flagscale.steps.student.describe import describe_student
from flagscale.steps.student.make import make_student

TOKENS = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0))
ROWS = 1040  # of every model's vocabulary; the tokenizer has 1000 tokens
OWN = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
# Each family's own students are of another one.
OTHER = dict(zip(OWN, [*list(OWN)[1:], "llama"], strict=True))
FEWER = {"num_layers": 2}
NARROWER = {"hidden_size": 32}
INITS: dict[str, dict[str, Any]] = {
    "depth, even": {"init": "depth", **FEWER},
    "depth, by KL": {"init": "depth", "layer_importance": "kl", **FEWER},
    "depth, by block influence": {"layer_importance": "block_influence", **FEWER},
    "width": {"init": "width", **NARROWER},
    "depth and width": {"init": "depth_and_width", **FEWER, **NARROWER},
    "to a target": {
        "init": "depth_and_width",
        "target_parameters": 140_000,
        "max_width_pruning": 0.6,
    },
    "same": {"init": "same"},
    "pretrained": {"init": "pretrained"},
    "scratch": {"init": "scratch", **FEWER},
}
MEASURED = {"calibration_tokens": 64}


@dataclass(frozen=True)
class Teacher:
    """The parts of an artifact that students are made of."""

    source: Path
    artifact: Path


def random_model(family: str, folder: Path) -> Path:
    values = {
        "vocab_size": ROWS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(len(family))
    config = AutoConfig.for_model(family, **values | OWN[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms are 1 otherwise
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def imported(source: Path, section: str, dataset: Path) -> Pretrained:
    facts = read_manifest(dataset).facts
    return open_pretrained(section, SourceRecipe(source=str(source)), source, facts)


@pytest.fixture(scope="module")
def teachers(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Teacher]:
    """Of a family, made once."""
    made: dict[str, Teacher] = {}

    def make(family: str) -> Teacher:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            artifact, source = folder / "teacher", random_model(family, folder / "source")
            pretrained = imported(source, "teacher", dataset)
            model = build_model(pretrained.shape, 64)
            pretrained.fill(model)
            with new_artifact(artifact, "teacher", {}) as staging:
                pretrained.shape.save(staging.path)
                describe(pretrained, dataset, staging.path / "hf")
                (staging.path / "hf" / "origin.json").write_text(json.dumps({"source": family}))
                save_weights(model, staging.path / WEIGHTS)
            made[family] = Teacher(source, artifact)
        return made[family]

    return make


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("init", INITS)
def test_a_student_comes_out_in_transformers(
    teachers: Callable[[str], Teacher], dataset: Path, tmp_path: Path, family: str, init: str
) -> None:
    teacher = teachers(family).artifact
    shape, source = ModelShape.load(teacher), None
    measured = init not in ("depth, even", "same", "pretrained", "scratch")
    recipe = StudentRecipe(**INITS[init] | (MEASURED if measured else {}) | _source(init, family))
    if init == "pretrained":
        source = imported(teachers(OTHER[family]).source, "student", dataset)
        shape = source.shape
    else:
        recipe = meet_targets(shape, recipe)
        shape = student_shape(shape, recipe)
    args = model_arguments(shape, 64)
    artifact, exported = tmp_path / "student", tmp_path / "exported"
    with use_args(args):
        model = make_student(recipe, source, teacher, dataset, args, torch.float32).model
    for folder in (artifact, exported):
        folder.mkdir()
    describe_student(source, shape, teacher, dataset, artifact)
    save_weights(model, artifact / WEIGHTS)
    write_weights(StoredTensors(artifact / WEIGHTS), WeightMap(shape), exported, torch.float32)
    write_config(load_hf_config(artifact / "hf"), exported)

    ours = logits(load_model(artifact, 64), TOKENS)
    theirs, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(TOKENS, use_cache=False).logits, atol=1e-5, rtol=0)
    assert ours.size(-1) == theirs.config.vocab_size == 1000
    assert theirs.config.model_type == (OTHER[family] if init == "pretrained" else family)
    whole = {"same": family, "pretrained": OTHER[family]}.get(init)
    if whole is not None:
        original = AutoModelForCausalLM.from_pretrained(teachers(whole).source)
        with torch.no_grad():
            expected = original(TOKENS, use_cache=False).logits[..., :1000]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    elif init != "scratch":
        assert theirs.num_parameters() < 0.9 * _parameters(teacher)


def _source(init: str, family: str) -> dict[str, str]:
    return {"source": OTHER[family]} if init == "pretrained" else {}


def _parameters(artifact: Path) -> int:
    return sum(
        torch.Size(shape).numel()
        for shape in WeightMap(ModelShape.load(artifact)).shapes().values()
    )
