"""The audit of a training while it runs, in one process; all layouts: `layout_worker.py`."""

import logging
from functools import partial

import pytest
import torch
from megatron.core.rerun_state_machine import (
    RerunMode,
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)

from flagscale.checkpoint import load_weights
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.post_training import attention_relations, conversion, hidden_states
from flagscale.post_training.divergences.reverse_kl import ReverseKL
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.train import train_gpt
from flagscale.train.audit import AuditError, TrainingAudit
from flagscale.train.batches import get_batch
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.loop import train, train_step
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training

RECIPE = TrainingRecipe(
    train_iters=3, micro_batch_size=2, global_batch_size=4, lr=1e-3, audit_interval=2
)
MIXED = DistillationRecipe(temperature=2.0, skip_lm_loss=False, kd_loss_scale=0.5)


@pytest.fixture
def training(runtime, args, student, teacher, dataset, tmp_path):
    """Trainer and batches, of a distillation with the LM loss beside it or of none."""

    def make(distillation=MIXED):
        chosen = training_arguments(args.shape, args.seq_length, RECIPE)
        if distillation is not None:
            chosen = with_teacher(chosen, teacher, distillation)
        with use_args(chosen):
            chunks = build_model_chunks(chosen)
            load_weights(chunks, student / "weights")
            trainer = setup_training(chunks, chosen, RECIPE)
            trainer.chunks[0].train()
            return chosen, trainer, RankBatches(dataset, tmp_path / "data", chosen, RECIPE)

    return make


@pytest.mark.parametrize("distillation", [MIXED, DistillationRecipe(), None])
def test_sound_training_is_told_of(training, distillation, caplog):
    """At the first step, and every second one."""
    chosen, trainer, batches = training(distillation)
    audit = TrainingAudit(trainer.chunks, chosen, 2)
    stream = batches.train(0)
    with use_args(chosen), caplog.at_level(logging.INFO, logger="flagscale"):
        for step in range(1, 5):
            train_step(trainer, stream, partial(audit.look, step))
    told = [record.message for record in caplog.records if "audit of step" in record.message]
    assert [message.split(":")[0] for message in told] == [f"audit of step {n}" for n in (1, 2, 4)]
    loss = "LM loss" if distillation is None else "KD loss"
    assert all(f"{loss} within" in message for message in told)


def test_without_an_interval_nothing_is_looked_at(training):
    chosen, trainer, _ = training()
    audit = TrainingAudit(trainer.chunks, chosen, 0)
    assert not any(audit.due(step) for step in range(1, 300))


def reverse(recipe):
    return ReverseKL(recipe.temperature)


PAIRED = MIXED.model_copy(
    update={
        "intermediate_layer_pairs": (("decoder.layers.0", "decoder.layers.2", "mse"),),
        "attention_layer_pairs": ((1, 3),),
        "attention_relations": ("query_key", "value"),
    }
)


def unscaled(row, column):
    return row.float() @ column.float().transpose(2, 3)


def of_all_tokens(self, first, rows, device):
    return torch.ones(rows, first + rows, dtype=torch.bool, device=device)


@pytest.mark.usefixtures("rerun_machine")
@pytest.mark.parametrize("fit", ["kl", "mse", "cosine"])
@pytest.mark.parametrize(
    ("where", "name", "planted", "kind"),
    [
        (attention_relations, "_scores", unscaled, "attention"),
        (attention_relations.Positions, "seen", of_all_tokens, "attention"),
        (hidden_states.FITS, "mse", hidden_states.cosine, "intermediate"),
    ],
    ids=["scores not scaled", "not causal", "another fit"],
)
def test_a_wrong_term_is_named(training, monkeypatch, fit, where, name, planted, kind):
    patch = monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr
    patch(where, name, planted)
    paired = PAIRED.model_copy(update={"attention_fit": fit})
    chosen, trainer, batches = training(paired)
    audit = TrainingAudit(trainer.chunks, chosen, 1)
    message = f"{kind} distillation loss is reported as .* but is .* in float64"
    with use_args(chosen), pytest.raises(AuditError, match=message):
        train_step(trainer, batches.train(0), partial(audit.look, 1))


def shifted_twice(*args):
    batch = get_batch(*args)
    return batch._replace(labels=batch.labels.roll(-1, 1))


@pytest.fixture
def rerun_machine(runtime):
    """Ended with the test: an error within a step leaves it there, as it leaves the process."""
    yield
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)


@pytest.mark.usefixtures("rerun_machine")
@pytest.mark.parametrize(
    ("where", "name", "planted", "message"),
    [
        (conversion, "divergence_of", reverse, "audit of step 1 failed, .* it is the reverse KL"),
        (train_gpt, "get_batch", shifted_twice, r"\d+ of \d+ labels are not the next token"),
    ],
    ids=["reversed KL", "labels"],
)
def test_a_wrong_figure_stops_the_training(
    training, tmp_path, monkeypatch, where, name, planted, message
):
    """Before the step is taken, and what was trained before is saved."""
    monkeypatch.setattr(where, name, planted)
    chosen, trainer, batches = training()
    before = [parameter.clone() for parameter in trainer.chunks[0].parameters()]
    saved = TrainingCheckpoints(tmp_path / "checkpoints", keep=1)
    with use_args(chosen), pytest.raises(AuditError, match=message):
        train(
            trainer,
            RECIPE,
            TrainingState(),
            batches.train(0),
            batches.validation,
            saved,
            Silent(),
            lambda: False,
        )
    for ours, theirs in zip(trainer.chunks[0].parameters(), before, strict=True):
        assert torch.equal(ours, theirs)
    assert list((tmp_path / "checkpoints").iterdir())


class Silent:
    def trained(self, record):
        raise AssertionError("no step is taken")

    def validated(self, record):
        pass

    def kept(self, checkpoints):
        pass
