"""Training on a GPU against the same on a CPU. Skips itself where there is no GPU."""

import pytest
import torch

from flagscale import platform
from flagscale.checkpoint import load_weights
from flagscale.data.loader import train_iterator
from flagscale.models.shape import ModelShape
from flagscale.post_training.kl_divergence import forward_kl
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.train.arguments import training_arguments, with_teacher
from flagscale.train.global_vars import use_args
from flagscale.train.loop import train_step
from flagscale.train.setup import setup_training
from flagscale.train.train_gpt import model_provider

pytestmark = pytest.mark.skipif(not platform.HAS_GPU, reason="no GPU on this machine")

STEPS = 5


def losses(student, teacher, dataset, cache, **choices):
    recipe = TrainingRecipe(
        train_iters=STEPS, micro_batch_size=2, global_batch_size=4, lr=1e-3, **choices
    )
    with platform.runtime():
        args = training_arguments(ModelShape.load(student), 64, recipe)
        args = with_teacher(args, teacher, DistillationRecipe())
        with use_args(args):
            model = model_provider()
            load_weights(model, student / "weights")
            trainer = setup_training(model, args, recipe)
            trainer.model.train()
            batches = train_iterator(
                dataset, cache, micro_batch_size=2, global_batch_size=4, seed=1
            )
            records = [train_step(trainer, batches) for _ in range(STEPS)]
    return [record["logits distillation loss"] for record in records]


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_bf16_follows_fp32(student, teacher, dataset, tmp_path, implementation):
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    exact = losses(student, teacher, dataset, tmp_path, precision="fp32", transformer_impl="local")
    found = losses(
        student, teacher, dataset, tmp_path, precision="bf16", transformer_impl=implementation
    )
    # bf16 keeps 8 bits; the KL of a pruned student is far above that noise.
    assert found == pytest.approx(exact, rel=0.05)


def test_kl_equals_float64():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(64, 49152, generator=generator) for _ in range(2))
    log_p = torch.log_softmax(teacher.double(), -1)
    exact = (log_p.exp() * (log_p - torch.log_softmax(student.double(), -1))).sum(-1)
    found = forward_kl(student.cuda(), teacher.cuda()).cpu().double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
