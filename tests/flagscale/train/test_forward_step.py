import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan

from flagscale.checkpoint import load_weights
from flagscale.megatron.arguments import with_teacher
from flagscale.megatron.global_vars import get_timers, use_args
from flagscale.recipe import DistillationRecipe
from flagscale.train.train_gpt import forward_step, loss_func, model_provider


def build(args, student):
    model = model_provider()
    load_weights(model, student / "weights")
    return model


def test_signature_is_the_contract():
    """Two arguments; the third is Megatron-Core's, for schedules that overlap communication."""
    parameters = inspect.signature(forward_step).parameters
    assert list(parameters) == ["data_iterator", "model", "return_schedule_plan"]
    assert parameters["return_schedule_plan"].default is False


def test_output_is_every_tokens_loss(args, student, batch, reference):
    with use_args(args):
        output, _ = forward_step(iter([batch]), build(args, student))
    expected = F.cross_entropy(
        reference.student(batch["tokens"]).logits.flatten(0, 1),
        batch["labels"].flatten(),
        reduction="none",
    ).view_as(batch["labels"])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_loss_function_comes_with_mask_and_model(args, student, batch):
    with use_args(args):
        model = build(args, student)
        _, loss_of = forward_step(iter([batch]), model)
    assert isinstance(loss_of, partial)
    assert loss_of.func is loss_func
    assert torch.equal(loss_of.args[0], batch["loss_mask"])
    assert loss_of.keywords == {"model": model}


def test_distillation_reaches_the_teacher(args, student, teacher, batch):
    with use_args(with_teacher(args, teacher, DistillationRecipe())):
        model = build(args, student)
        model.train()
        output, loss_of = forward_step(iter([batch]), model)
        loss, _, report = loss_of(output)
    assert torch.equal(output, torch.zeros_like(output))  # the LM loss is skipped
    assert loss > 0
    assert report["logits distillation loss"][0] > 0


def test_takes_one_micro_batch_a_call_and_times_it(args, student, batch):
    data_iterator = iter([batch, batch, batch])
    with use_args(args):
        model = build(args, student)
        get_timers()._log_level = 2  # as a run that asks for detailed timers
        forward_step(data_iterator, model)
        forward_step(data_iterator, model)
        assert get_timers()("batch-generator").active_time() > 0
    assert len(list(data_iterator)) == 1


def test_context_is_causal(args, student, batch):
    """What comes later changes no loss before it."""
    later = {key: value.clone() for key, value in batch.items()}
    later["tokens"][:, 40:] = 5
    with use_args(args):
        model = build(args, student)
        outputs = [forward_step(iter([values]), model)[0] for values in (batch, later)]
    assert torch.equal(outputs[0][:, :40], outputs[1][:, :40])
    assert not torch.equal(outputs[0][:, 40:], outputs[1][:, 40:])


def test_attention_mask_is_honoured(args, student, batch):
    """A mask that hides the first half from the second equals two shorter samples."""
    tokens, labels = batch["tokens"], batch["labels"]
    half = tokens.size(1) // 2
    causal = torch.ones(2 * half, 2 * half).triu(1).bool()
    causal[half:, :half] = True
    positions = torch.arange(half).repeat(2).expand_as(tokens)
    masked = {**batch, "attention_mask": causal[None, None], "position_ids": positions}
    second = {
        "tokens": tokens[:, half:],
        "labels": labels[:, half:],
        "loss_mask": batch["loss_mask"][:, half:],
        "position_ids": positions[:, half:],
    }
    with use_args(args):
        model = build(args, student)
        # RoPE is relative: the second half's positions may start anywhere.
        found, _ = forward_step(iter([masked]), model)
        expected, _ = forward_step(iter([second]), model)
    torch.testing.assert_close(found[:, half:], expected, rtol=1e-4, atol=1e-5)


def test_legacy_models_get_no_loss_mask(args, batch):
    seen = []

    class Legacy(torch.nn.Module):
        def forward(self, tokens, position_ids, attention_mask, labels=None):
            seen.append((tokens, position_ids, attention_mask, labels))
            return labels.float()

    with use_args(replace(args, use_legacy_models=True)):
        output, _ = forward_step(iter([batch]), Legacy())
    assert torch.equal(output, batch["labels"].float())
    assert torch.equal(seen[0][0], batch["tokens"])


def test_schedule_plan(args, student, batch):
    """What Megatron-Core's overlapping schedule runs instead of the model; refused elsewhere."""
    with use_args(args):
        model = build(args, student)
        with pytest.raises(ValueError, match="overlap_moe_expert_parallel_comm=True"):
            forward_step(iter([batch]), model, return_schedule_plan=True)
    with use_args(replace(args, overlap_moe_expert_parallel_comm=True)):
        plan, loss_of = forward_step(iter([batch]), model, return_schedule_plan=True)
    assert isinstance(plan, TransformerModelChunkSchedulePlan)
    assert plan.num_layers() == args.shape.num_layers
    assert torch.equal(loss_of.args[0], batch["loss_mask"])
