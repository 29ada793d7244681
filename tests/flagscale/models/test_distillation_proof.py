"""Each proof of a conversion, on a sound one, and with the fault planted that it is there for."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from flagscale.data.loader import validation_batches
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.models.distillation_proof import PROOF_LOSS, prove_every_parameter_learns
from flagscale.models.megatron import build_model, load_model
from flagscale.recipe import ArchitectureRecipe

SEQ_LENGTH = 64


@pytest.fixture
def shape(teacher: Path, request: pytest.FixtureRequest) -> ModelShape:
    """The student's: the teacher's, with the architecture that the test asks for."""
    architecture = ArchitectureRecipe(**getattr(request, "param", {}))
    return replace(ModelShape.load(teacher), num_layers=2, architecture=architecture)


@pytest.fixture(autouse=True)
def arguments(teacher: Path, shape: ModelShape) -> Iterator[None]:
    args = with_teacher(model_arguments(shape, SEQ_LENGTH), teacher, PROOF_LOSS)
    with platform.runtime(), use_args(args):
        yield


@pytest.fixture
def taught(teacher: Path, arguments: None) -> GPTModel:
    return load_model(teacher, SEQ_LENGTH)


@pytest.fixture
def learner(shape: ModelShape, arguments: None) -> GPTModel:
    return build_model(shape, SEQ_LENGTH)


@pytest.fixture
def batch(dataset: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    batches = validation_batches(
        dataset, tmp_path / "cache", micro_batch_size=1, global_batch_size=1, eval_iters=1
    )
    return next(iter(batches))


ARCHITECTURES = [
    {},
    {"num_experts": 8, "moe_ffn_hidden_size": 32},
    {"normalization": "LayerNorm", "mtp_num_layers": 1},
]


@pytest.mark.parametrize(
    "shape", ARCHITECTURES, indirect=True, ids=["dense", "experts", "multi-token prediction"]
)
def test_every_parameter_learns(learner, taught, batch):
    """And not two gradients are there at once."""
    own = list(learner.parameters())
    held = []

    def count(parameter: torch.Tensor) -> None:
        held.append(sum(one.grad is not None for one in own))

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(count)
    loss, _ = prove_every_parameter_learns(learner, taught, batch)
    assert loss > 0.01
    assert len(held) > len(own) / 2  # an expert that nobody chose has none
    assert max(held) == 1
    assert not [one for one in own if one.grad is not None]


def cut_off(student: GPTModel, teacher: GPTModel) -> None:
    """The MLP of layer 1: its gate is closed for every input."""
    student.decoder.layers[1].mlp.linear_fc2.weight.data.zero_()
    student.decoder.layers[1].mlp.linear_fc1.weight.data.zero_()


def share(student: GPTModel, teacher: GPTModel) -> None:
    """One tensor of both models, which the conversion freezes with the teacher."""
    ours, theirs = (model.decoder.layers[0].mlp.linear_fc2 for model in (student, teacher))
    ours.weight = theirs.weight


def spoil(value: float, student: GPTModel, teacher: GPTModel) -> None:
    weight = student.decoder.layers[0].self_attention.linear_qkv.weight
    weight.register_hook(lambda gradient: gradient * value)


def thaw(student: GPTModel, teacher: GPTModel) -> None:
    """Make a parameter of the teacher trainable again after the conversion."""
    weight = teacher.decoder.final_layernorm.weight

    def make_trainable(*_: object) -> None:
        weight.requires_grad_(True)

    teacher.register_forward_pre_hook(make_trainable)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (cut_off, r"student's decoder\.layers\.1\..*a gradient of zeros: it would not learn"),
        (share, r"student's decoder\.layers\.0\.mlp\.linear_fc2\.weight got no gradient"),
        (partial(spoil, float("nan")), r"layers\.0\.self_attention\.linear_qkv.*no finite grad"),
        (partial(spoil, float("inf")), r"layers\.0\.self_attention\.linear_qkv.*no finite grad"),
        (thaw, r"teacher's decoder\.final_layernorm\.weight got a gradient"),
    ],
    ids=["cut off", "shared", "nan", "infinite", "teacher"],
)
def test_faults_are_noticed(learner, taught, batch, plant, message):
    plant(learner, taught)
    with pytest.raises(UserError, match=message):
        prove_every_parameter_learns(learner, taught, batch)


@pytest.mark.parametrize("shape", [ARCHITECTURES[2]], indirect=True)
@pytest.mark.parametrize("name", ["mtp.layers.0.eh_proj.weight", "decoder.final_layernorm.weight"])
def test_prediction_and_model_must_both_learn(learner, taught, batch, name):
    """The one by the plain loss, the other by distillation, whatever the plain loss reaches."""
    learner.get_parameter(name).requires_grad_(False)
    with pytest.raises(UserError, match=rf"student's {name} got no gradient"):
        prove_every_parameter_learns(learner, taught, batch)
