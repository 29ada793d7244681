"""Tests written for FlagScale's `train_gpt.py` replace these names and see these calls."""

from unittest.mock import MagicMock, patch

import pytest
import torch

from flagscale.train import train_gpt

BATCH = tuple(torch.full((1, 4), value) for value in range(5))


@pytest.fixture
def seams(runtime):
    """The module with all that upstream's tests replace; arguments are a Megatron namespace."""
    names = (
        "get_args",
        "get_timers",
        "get_batch",
        "modelopt_args_enabled",
        "model_provider_modelopt",
        "loss_func_modelopt",
    )
    with patch.multiple(train_gpt, **{name: MagicMock(name=name) for name in names}):
        train_gpt.get_args.return_value = MagicMock(
            use_legacy_models=False,
            record_memory_history=False,
            use_dualpipev=False,
            check_for_nan_in_loss_and_grad=False,
            check_for_spiky_loss=False,
        )
        train_gpt.get_batch.return_value = BATCH
        yield train_gpt


def test_model_provider_asks_modelopt(seams):
    seams.modelopt_args_enabled.return_value = True
    model = seams.model_provider(pre_process=False, post_process=True)
    seams.modelopt_args_enabled.assert_called_once_with(seams.get_args.return_value)
    seams.model_provider_modelopt.assert_called_once_with(False, True)
    assert model is seams.model_provider_modelopt.return_value


def test_loss_func_hands_on_to_modelopt(seams):
    seams.modelopt_args_enabled.return_value = True
    mask, output, model = torch.ones(1, 4), torch.ones(1, 4), MagicMock()
    result = seams.loss_func(mask, output, model=model)
    seams.loss_func_modelopt.assert_called_once_with(mask, output, model=model)
    assert result is seams.loss_func_modelopt.return_value


def test_loss_func_sums_without_modelopt(seams):
    seams.modelopt_args_enabled.return_value = False
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    loss, num_tokens, report = seams.loss_func(mask, torch.tensor([[2.0, 5.0, 3.0]]))
    assert (loss, num_tokens) == (5, 2)
    assert report["lm loss"].tolist() == [5, 2]
    seams.loss_func_modelopt.assert_not_called()


@pytest.mark.parametrize("legacy", [False, True])
def test_forward_step_calls_the_model(seams, legacy):
    seams.get_args.return_value.use_legacy_models = legacy
    tokens, labels, loss_mask, attention_mask, position_ids = BATCH
    model, iterator = MagicMock(), MagicMock()
    output, loss_of = seams.forward_step(iterator, model)
    seams.get_batch.assert_called_once_with(iterator)
    named = {"labels": labels} if legacy else {"labels": labels, "loss_mask": loss_mask}
    model.assert_called_once_with(tokens, position_ids, attention_mask, **named)
    assert output is model.return_value
    assert loss_of.func is seams.loss_func
    assert loss_of.args == (loss_mask,)
    assert loss_of.keywords == {"model": model}


def test_forward_step_times_the_batch(seams):
    seams.forward_step(MagicMock(), MagicMock())
    timers = seams.get_timers.return_value
    timers.assert_any_call("batch-generator", log_level=2)
    timers.return_value.start.assert_called_once_with()
    timers.return_value.stop.assert_called_once_with()


def test_forward_step_gives_the_schedule_a_plan(seams):
    model = MagicMock()
    output, _ = seams.forward_step(MagicMock(), model, return_schedule_plan=True)
    assert output is model.build_schedule_plan.return_value
    model.assert_not_called()
