"""The training loop: its figures, where it goes on, when it validates and saves."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from megatron.core.rerun_state_machine import (
    RerunMode,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from six_steps import RECIPE

from flagscale.checkpoint import load_weights
from flagscale.data.loader import train_iterator
from flagscale.errors import Interrupted, UserError
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.recipe import DistillationRecipe
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.loop import train
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training


class Records:
    """Keeps what the loop tells, asks it to stop after a step, and has a clock of its own."""

    def __init__(self, stop_after=None):
        self.training, self.validation, self.stop_after = [], [], stop_after

    def clock(self):
        """A minute a step."""
        return 60.0 * len(self.training)

    def trained(self, record):
        self.training.append(record)

    def validated(self, record):
        self.validation.append(record)

    def kept(self, checkpoints):
        pass

    def stop_requested(self):
        return self.training[-1]["step"] == self.stop_after

    def losses(self):
        """Everything but the clock's part."""
        return [
            {name: value for name, value in record.items() if name != "tokens per second"}
            for record in self.training
        ]


@pytest.fixture
def run(runtime, args, student, teacher, dataset, tmp_path):
    def run(recipe=RECIPE, folder=tmp_path / "checkpoints", stop_after=None, distil=True):
        chosen = training_arguments(args.shape, args.seq_length, recipe)
        if distil:
            chosen = with_teacher(chosen, teacher, DistillationRecipe(temperature=2.0))
        records = Records(stop_after)
        with use_args(chosen):
            chunks = build_model_chunks(chosen)
            load_weights(chunks, student / "weights")
            trainer = setup_training(chunks, chosen, recipe)
            trainer.chunks[0].train()
            checkpoints = TrainingCheckpoints(folder, keep=9, may_be_best=recipe.saves_at)
            state = checkpoints.restore(trainer)
            batches = RankBatches(dataset, tmp_path / "data", chosen, recipe)
            train(
                trainer,
                recipe,
                state,
                batches.train(state.step),
                batches.validation,
                checkpoints,
                records,
                records.stop_requested,
                records.clock,
            )
        return records, state

    return run


def learning_rates(recipe):
    """Linear warmup from one notch above 0, then cosine, as Megatron counts."""
    rates = []
    for step in range(recipe.train_iters):
        if step < recipe.lr_warmup_iters:
            first = recipe.lr / (recipe.lr_warmup_iters + 1)
            rates.append(first + (recipe.lr - first) * step / recipe.lr_warmup_iters)
            continue
        done = (step - recipe.lr_warmup_iters) / (recipe.train_iters - recipe.lr_warmup_iters)
        cosine = (1 + math.cos(math.pi * done)) / 2
        rates.append(recipe.min_lr + (recipe.lr - recipe.min_lr) * cosine)
    return rates


def plain_training(reference, dataset, cache, recipe):
    """The same training with transformers and torch alone, in float64."""
    student, teacher = reference.student, reference.teacher
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
    )
    batches = train_iterator(
        dataset, cache, micro_batch_size=4, global_batch_size=4, seed=recipe.seed
    )
    losses, norms = [], []
    for rate in learning_rates(recipe):
        batch = next(batches)
        with torch.no_grad():
            log_p = F.log_softmax(teacher(batch["tokens"]).logits / 2, -1)
        log_q = F.log_softmax(student(batch["tokens"]).logits / 2, -1)
        loss = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.clip_grad).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def test_equals_plain_training_in_float64(run, reference, dataset, tmp_path):
    """Accumulation, clipping, schedule, AdamW and the KD loss, six steps long."""
    records, _ = run()
    losses, norms = plain_training(reference, dataset, tmp_path / "plain", RECIPE)
    for record, loss, norm, rate in zip(
        records.training, losses, norms, learning_rates(RECIPE), strict=True
    ):
        assert record["logits distillation loss"] == pytest.approx(loss, rel=1e-5)
        assert record["grad norm"] == pytest.approx(norm, rel=1e-4)
        assert record["learning rate"] == pytest.approx(rate, rel=1e-6)
    assert losses[-1] < losses[0]


def test_same_seed_same_losses(run, tmp_path):
    first, _ = run(folder=tmp_path / "a")
    second, _ = run(folder=tmp_path / "b")
    other, _ = run(folder=tmp_path / "c", recipe=RECIPE.model_copy(update={"seed": 6}))
    assert first.losses() == second.losses()
    assert first.validation == second.validation
    assert first.losses() != other.losses()


@pytest.mark.parametrize(("stop_after", "distil"), [(1, True), (4, True), (3, False)])
def test_interrupted_and_resumed_equals_uninterrupted(run, tmp_path, stop_after, distil):
    whole, whole_state = run(folder=tmp_path / "whole", distil=distil)
    with pytest.raises(Interrupted, match=f"after step {stop_after} of 6"):
        run(stop_after=stop_after, distil=distil)
    rest, state = run(distil=distil)
    assert rest.training[0]["step"] == stop_after + 1
    assert rest.losses() == whole.losses()[stop_after:]
    assert state.validation == whole_state.validation
    assert [r["step"] for r in state.training] == [1, 2, 3, 4, 5, 6]


def test_checkpoint_that_was_never_finished_is_ignored(run, tmp_path):
    with pytest.raises(Interrupted):
        run(stop_after=2)
    folder = tmp_path / "checkpoints"
    half = folder / ".step-00000003.partial"
    half.mkdir()
    (half / "state").write_text("cut short")
    rest, _ = run()
    assert rest.training[0]["step"] == 3
    assert not half.exists()


def test_validates_and_saves_at_interval_and_end(run, tmp_path):
    records, state = run(recipe=RECIPE.model_copy(update={"eval_interval": 4}))
    assert saved(tmp_path / "checkpoints") == [2, 4, 6]
    assert [r["step"] for r in records.validation] == [0, 4, 6]
    assert state.validation == records.validation
    assert records.validation[-1]["lm loss"] < records.validation[0]["lm loss"]


@pytest.mark.parametrize(
    ("minutes", "steps"), [(2, [2, 4, 5]), (3, [3, 5]), (1.5, [2, 4, 5]), (0.5, [1, 2, 3, 4, 5])]
)
def test_saves_by_time(run, tmp_path, minutes, steps):
    """Whatever is lost of a training that is gone without a word is no more than that."""
    recipe = RECIPE.model_copy(update={"save_interval": 99, "save_interval_minutes": minutes})
    with pytest.raises(Interrupted):
        run(recipe=recipe, stop_after=5)
    assert saved(tmp_path / "checkpoints") == steps
    shutil.rmtree(tmp_path / "checkpoints" / f"step-{steps[-1]:08d}")  # made when asked to stop
    rest, state = run(recipe=recipe)
    assert rest.training[0]["step"] == steps[-2] + 1
    whole, whole_state = run(folder=tmp_path / "whole")
    assert rest.losses() == whole.losses()[steps[-2] :]
    assert state.validation == whole_state.validation


def test_a_save_by_steps_counts_for_the_time(run, tmp_path):
    run(recipe=RECIPE.model_copy(update={"save_interval": 4, "save_interval_minutes": 3}))
    assert saved(tmp_path / "checkpoints") == [3, 4, 6]


def test_no_saves_by_time(run, tmp_path):
    run(recipe=RECIPE.model_copy(update={"save_interval": 99, "save_interval_minutes": None}))
    assert saved(tmp_path / "checkpoints") == [6]


def test_the_best_does_not_depend_on_the_clock(run, tmp_path):
    """At a rate at which losses go up and down, a step between is better than those that count."""
    changes = {"lr": 0.01, "lr_decay_style": "constant", "eval_interval": 1, "save_interval": 3}
    recipe = RECIPE.model_copy(update={**changes, "save_interval_minutes": 1})
    _, state = run(recipe=recipe)
    assert saved(tmp_path / "checkpoints") == [1, 2, 3, 4, 5, 6]
    losses = {record["step"]: record["lm loss"] for record in state.validation}
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"]
    assert best == min((3, 6), key=lambda step: losses[step])
    assert losses[best] > min(losses.values())


def saved(folder):
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.glob("step-*"))]


def test_wsd_schedule(run):
    recipe = RECIPE.model_copy(update={"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2})
    records, _ = run(recipe=recipe)
    rates = [record["learning rate"] for record in records.training]
    assert rates[2:5] == pytest.approx([recipe.lr] * 3)  # decay begins after step 4
    assert rates[5] < recipe.lr


def test_fresh_folder_starts_at_zero(runtime, tmp_path):
    assert TrainingCheckpoints(tmp_path / "none").restore(None) == TrainingState()


def test_recompute_changes_no_loss(run, tmp_path):
    plain, _ = run(folder=tmp_path / "a")
    recomputed, _ = run(
        folder=tmp_path / "b", recipe=RECIPE.model_copy(update={"recompute_granularity": "full"})
    )
    for ours, theirs in zip(recomputed.losses(), plain.losses(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_checked_steps_are_the_same(run, tmp_path):
    """And validations are none: the rerun state machine refuses to look at them."""
    plain, _ = run(folder=tmp_path / "plain")
    machine = get_rerun_state_machine()
    machine.set_mode(RerunMode.VALIDATE_RESULTS)
    try:
        checked, _ = run(folder=tmp_path / "checked")
        assert machine.get_mode() == RerunMode.VALIDATE_RESULTS
    finally:
        destroy_rerun_state_machine()
        initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    assert checked.losses() == plain.losses()
    assert checked.validation == plain.validation


def test_gradient_norm_is_told_without_a_limit(run, tmp_path):
    limits = {"far": 1e6, "none": 0.0}
    far, none = (
        run(RECIPE.model_copy(update={"clip_grad": limit}), folder=tmp_path / name)[0]
        for name, limit in limits.items()
    )
    assert none.losses() == far.losses()
    assert none.training[0]["grad norm"] > 0


def test_timers_tell_where_the_time_goes(run, tmp_path, caplog):
    caplog.set_level("INFO")
    run(recipe=RECIPE.model_copy(update={"timing_log_level": 2}))
    told = [r.getMessage() for r in caplog.records if "time a step" in r.getMessage()]
    assert len(told) == 2  # after steps 3 and 6
    assert "batch-generator" in told[0]
    assert "forward-compute" in told[0]


def test_straggler_detector_without_a_gpu_is_refused(run):
    with pytest.raises(UserError, match=r"log_straggler=true.*GPU"):
        run(recipe=RECIPE.model_copy(update={"log_straggler": True}))
