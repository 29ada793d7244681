"""A step by itself: what it reports, and one whose result is not to be trusted."""

import math
from dataclasses import replace

import pytest
import torch
from megatron.core.rerun_state_machine import (
    RerunMode,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from six_steps import RECIPE

from flagscale.checkpoint import load_weights
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.recipe import ArchitectureRecipe
from flagscale.train.loop import SuspiciousResultError, evaluate_loss, train_step
from flagscale.train.rank_batches import RankBatches
from flagscale.train.schedule import reduce_reports
from flagscale.train.setup import build_model_chunks, setup_training


class FlakyDevice:
    """Adds an error to the model's output, the first time or every time."""

    def __init__(self, always):
        self.always, self.calls = always, 0

    def __call__(self, module, inputs, output):
        self.calls += 1
        if self.calls == 1 or self.always:
            return output * float("nan")
        return output


@pytest.mark.parametrize("always", [False, True])
def test_suspicious_step_is_computed_again(runtime, args, student, dataset, tmp_path, always):
    """A result that differs the second time was a fault; the step is not taken either way."""
    machine = get_rerun_state_machine()
    machine.set_mode(RerunMode.VALIDATE_RESULTS)
    try:
        chosen = training_arguments(args.shape, args.seq_length, RECIPE)
        with use_args(chosen):
            chunks = build_model_chunks(chosen)
            load_weights(chunks, student / "weights")
            trainer = setup_training(chunks, chosen, RECIPE)
            batches = RankBatches(dataset, tmp_path / "data", chosen, RECIPE).train(0)
            # Megatron-Core trusts the first step of a process: it has nothing to compare with.
            train_step(trainer, batches)
            before = [p.clone() for p in trainer.chunks[0].parameters()]
            device = FlakyDevice(always)
            chunks[0].register_forward_hook(device)
            with pytest.raises(SuspiciousResultError, match="the step was not taken"):
                train_step(trainer, batches)
            assert device.calls > 2  # two micro-batches, and again
            for ours, theirs in zip(trainer.chunks[0].parameters(), before, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        destroy_rerun_state_machine()
        initialize_rerun_state_machine(mode=RerunMode.DISABLED)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (ArchitectureRecipe(num_experts=4, moe_aux_loss_coeff=0.1), "load balancing loss"),
        (ArchitectureRecipe(mtp_num_layers=1), "mtp_1 loss"),
    ],
)
def test_losses_of_layers_are_reported(runtime, args, dataset, tmp_path, architecture, name):
    chosen = training_arguments(
        replace(args.shape, architecture=architecture), args.seq_length, RECIPE
    )
    with use_args(chosen):
        trainer = setup_training(build_model_chunks(chosen), chosen, RECIPE)
        batches = RankBatches(dataset, tmp_path / "data", chosen, RECIPE)
        evaluate_loss(trainer.chunks, batches.validation(), 1)
        stream = batches.train(0)
        first, second = train_step(trainer, stream), train_step(trainer, stream)
    # Random weights: experts are drawn evenly (1 is even), and any token is as likely as another.
    expected = 1.0 if name == "load balancing loss" else math.log(args.shape.vocab_size)
    for record in (first, second):
        assert record[name] / expected == pytest.approx(1, rel=0.2)


def masked(batches, number):
    """The micro-batches, of which one has no loss anywhere."""
    for index, batch in enumerate(batches):
        yield {**batch, "loss_mask": batch["loss_mask"] * (index != number)}


def test_a_masked_micro_batch_leaves_no_nan(runtime, args, dataset, tmp_path):
    """Not even of further tokens, whose mean Megatron-Core takes over a micro-batch's tokens."""
    shape = replace(args.shape, architecture=ArchitectureRecipe(mtp_num_layers=1))
    chosen = training_arguments(shape, args.seq_length, RECIPE)
    with use_args(chosen):
        trainer = setup_training(build_model_chunks(chosen), chosen, RECIPE)
        batches = RankBatches(dataset, tmp_path / "data", chosen, RECIPE)
        stream = [masked(batches.train(0)[0], 1)]
        first, second = train_step(trainer, stream), train_step(trainer, stream)
    assert all(math.isfinite(value) for value in (*first.values(), *second.values()))
    assert "mtp_1 loss" not in first
    assert "mtp_1 loss" in second


def test_reports_are_weighted_by_their_tokens(runtime):
    reports = [{"lm loss": torch.tensor([6.0, 3.0])}, {"lm loss": torch.tensor([4.0, 1.0])}]
    assert reduce_reports(reports) == {"lm loss": 2.5}
    assert reduce_reports([{"lm loss": torch.zeros(2)}]) == {"lm loss": 0.0}
