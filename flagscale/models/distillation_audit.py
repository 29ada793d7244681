"""The audit of a conversion: training's own way on a few tokens, each figure held against float64.

`flagscale/post_training/preflight.py` says what must hold; this says what is run for it. Most runs
are of 64 tokens, forward alone; a backward pass through all of the student is made once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.global_vars import get_args, use_args
from flagscale.models.distillation_proof import (
    Batch,
    distilling,
    prove_every_parameter_learns,
    run,
    twin,
)
from flagscale.models.megatron import hidden_states, without_multi_token_prediction
from flagscale.post_training.findings import Finding, failures, fault, not_run, of_all_ranks
from flagscale.post_training.float64_layers import check_layers, seen_layers
from flagscale.post_training.preflight import (
    KD,
    LM,
    check_equal,
    check_gradient,
    check_losses,
    check_mixed,
    check_validation,
)
from flagscale.post_training.preflight_family import check_family
from flagscale.post_training.preflight_models import (
    check_batch,
    check_causal,
    check_masked,
    check_teacher,
    check_teacher_loss,
    check_weights,
)
from flagscale.post_training.tap import STUDENT, Edit, Seen, Tap
from flagscale.recipe import DistillationRecipe

# Another temperature than 1, so that T and T^2 show; the LM loss is mixed in by a check.
AUDITED_LOSS = DistillationRecipe(temperature=2.0)
_TOKENS = 64
_MASKED_EVERY = 4


@dataclass(frozen=True)
class Audited:
    """What an audit found.

    Attributes:
        findings: this rank's, one a check.
        kd_loss_at_start: of the student, nats a token: forward KL at temperature 1.
        kd_loss_when_equal: of the teacher against itself.
        figures: what no layout may change: losses, and the size of the KD loss' gradient.
    """

    findings: list[Finding]
    kd_loss_at_start: float
    kd_loss_when_equal: float
    figures: dict[str, float]


def audit(
    student: GPTModel,
    teacher: GPTModel,
    batch: Batch,
    unigram: float,
    recipe: DistillationRecipe = AUDITED_LOSS,
) -> Audited:
    """Run all checks that two models and one micro-batch allow. All ranks call it.

    Called within `use_args` of the student's arguments `with_teacher`. The models are plain, and
    are so again afterwards.

    Args:
        student: this rank's part.
        teacher: this rank's part, of the same layout.
        batch: one row of the data loader, the same on every rank.
        unigram: see `check_teacher_loss`.
        recipe: the loss; the LM loss is left out of it but where a check is about it.
    """
    findings = [
        check_weights("teacher", teacher.named_parameters()),
        check_weights("student", student.named_parameters()),
        _tied(student, teacher),
    ]
    if failures(of_all_ranks(findings)):
        findings.append(not_run("losses and gradients", "nothing can be computed with the weights"))
        return Audited(findings, math.nan, math.nan, {})
    reached = _reached(student, teacher, batch)
    findings.append(reached.finding)
    if reached.seen is not None:
        findings.append(check_teacher_loss(reached.seen, unigram))
    alone = recipe.model_copy(update={"skip_lm_loss": True, "kd_loss_scale": 1.0})
    short = _short(batch)
    figures: dict[str, float] = {}
    when_equal = math.nan
    try:
        with use_args(replace(get_args(), seq_length=short["tokens"].size(1))):
            found, figures = _losses(student, teacher, short, alone)
            findings += found
            found, when_equal = _when_equal(teacher, short, alone, figures["KD gradient"])
            findings += found
    except RuntimeError as error:
        findings.append(_failed("losses", "a micro-batch", error))
    for model in (student, teacher):
        model.eval()
        model.zero_grad(set_to_none=True)
    return Audited(findings, reached.kd_loss, when_equal, figures)


class _Reached(NamedTuple):
    """What came of the whole backward pass."""

    finding: Finding
    kd_loss: float
    seen: Seen | None


def _reached(student: GPTModel, teacher: GPTModel, batch: Batch) -> _Reached:
    name, note = "gradients", "reach every parameter of the student and none of the teacher"
    try:
        loss, seen = prove_every_parameter_learns(student, teacher, batch)
    except UserError as error:  # on all ranks
        return _Reached(fault(name, str(error), note), math.nan, None)
    except RuntimeError as error:
        return _Reached(_failed(name, "the backward pass", error), math.nan, None)
    return _Reached(fault(name, None, note), loss, seen)


def _failed(check: str, what: str, error: RuntimeError) -> Finding:
    """What cannot be computed; where there are other ranks, which may wait, it is raised."""
    if torch.distributed.get_world_size() > 1:
        raise error
    return fault(check, f"{what} fails: {str(error).partition(chr(10))[0]}", "")


def _losses(
    student: GPTModel, teacher: GPTModel, batch: Batch, recipe: DistillationRecipe
) -> tuple[list[Finding], dict[str, float]]:
    """Value and gradient of every loss, and what must not change them.

    Returns:
        The findings, and `Audited.figures`.
    """
    mixed = recipe.model_copy(update={"skip_lm_loss": False})
    with without_multi_token_prediction(teacher), torch.no_grad():
        by_itself_sbh = hidden_states(teacher.eval(), batch["tokens"])
    with distilling(student, teacher, recipe) as model:
        _, alone = run(model, batch, forward_only=True, tap=Tap(model, differentiates=True))
        frozen: list[Finding] = []
        if alone is not None and by_itself_sbh is not None:
            frozen = [check_teacher(alone, by_itself_sbh.transpose(0, 1), teacher)]
    with distilling(student, teacher, mixed) as model, torch.no_grad():
        tap = Tap(model, _unchanged, layers=seen_layers(mixed))
        losses, beside = run(model, batch, forward_only=True, tap=tap)
        terms = check_layers(tap, mixed, model)
        perturbed, edit = _perturbed(batch, student.unpadded_vocab_size)
        _, elsewhere = run(model, perturbed, forward_only=True, tap=Tap(model, edit))
        _, evaluated = run(model, batch, forward_only=True, training=False)
    size = torch.zeros((), dtype=torch.float64, device=platform.device())
    if alone is not None:
        size = alone.heads[STUDENT].gradient().norm()
    torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
    figures = {"KD loss": losses[KD], "LM loss": losses[LM], "KD gradient": size.item()}
    if alone is None or beside is None or elsewhere is None or evaluated is None:
        return [], figures
    found = [
        *check_batch(alone, batch),
        *frozen,
        *check_causal(alone, elsewhere),
        *check_losses(beside, mixed),
        *terms,
        check_gradient(alone, recipe),
        *check_family(alone),
        check_mixed(alone, beside),
        check_validation(beside, evaluated),
        check_masked(beside, elsewhere),
    ]
    return found, figures


def _when_equal(
    teacher: GPTModel, batch: Batch, recipe: DistillationRecipe, size: float
) -> tuple[list[Finding], float]:
    """The teacher against itself, by its logits: paired layers need not be the same there."""
    recipe = recipe.model_copy(update={"intermediate_layer_pairs": (), "attention_layer_pairs": ()})
    with distilling(twin(teacher), teacher, recipe) as model:
        losses, seen = run(model, batch, forward_only=True, tap=Tap(model, differentiates=True))
    return ([] if seen is None else check_equal(seen, size)), losses[KD]


def _short(batch: Batch) -> Batch:
    """The first tokens of the batch; some of them, and the last ones, are masked."""
    length = min(_TOKENS, batch["tokens"].size(1))
    short = {
        name: value[:, :length].clone()
        for name, value in batch.items()
        if name in ("tokens", "labels", "loss_mask", "position_ids")
    }
    every = torch.arange(length) % _MASKED_EVERY == 1
    every[3 * length // 4 :] = True
    short["loss_mask"] = torch.where(every, 0.0, short["loss_mask"])
    if not short["loss_mask"].any():  # a prompt, of which nothing is learnt
        short["loss_mask"][:, 0] = 1.0
    return short


def _unchanged(whose: str, hidden_sbh: torch.Tensor) -> torch.Tensor:
    return hidden_sbh


def _perturbed(batch: Batch, vocab_size: int) -> tuple[Batch, Edit]:
    """Where the mask is 0 other labels and states; after all that is not masked, other tokens."""
    masked_bs = batch["loss_mask"] == 0
    last = int((~masked_bs).any(0).nonzero().max())
    tokens = batch["tokens"].clone()
    tokens[:, last + 1 :] = (tokens[:, last + 1 :] + 1) % vocab_size
    labels = torch.where(masked_bs, (batch["labels"] + 1) % vocab_size, batch["labels"])

    def edit(whose: str, hidden_sbh: torch.Tensor) -> torch.Tensor:
        masked_sb = masked_bs.T.to(hidden_sbh.device)
        if hidden_sbh.size(0) < masked_sb.size(0):  # sequence parallel
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            rank = parallel_state.get_tensor_model_parallel_rank()
            masked_sb = masked_sb.tensor_split(ranks)[rank]
        return torch.where(masked_sb[..., None], 1 - 2 * hidden_sbh.flip(-1), hidden_sbh)

    return {**batch, "tokens": tokens, "labels": labels}, edit


def _tied(student: GPTModel, teacher: GPTModel) -> Finding:
    """Whether output layers share the embedding's weight as the shapes say."""
    name = "tied weights"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return not_run(name, "the two ends of a pipeline hold copies, whose gradients are summed")
    cause = None
    for whose, model in (("student", student), ("teacher", teacher)):
        embedding = model.embedding.word_embeddings.weight
        if model.share_embeddings_and_output_weights:
            used = model.shared_embedding_or_output_weight()
            if used.data_ptr() != embedding.data_ptr():
                cause = f"the {whose}'s output layer has weights of its own, but must share the "
                cause += "embedding's"
        elif model.output_layer.weight.data_ptr() == embedding.data_ptr():
            cause = f"the {whose}'s output layer shares the embedding's weights, but must have own"
    return fault(name, cause, "output layers share or own weights as they must")
