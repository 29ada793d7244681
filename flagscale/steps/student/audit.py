"""convert-student's audit of what it has made: raised, logged, and as a page."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from flagscale.artifacts import Staging
from flagscale.errors import UserError
from flagscale.evaluation.pages.audit import AUDIT, render
from flagscale.execution.launch import is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.global_vars import get_args, use_args
from flagscale.megatron.layout import sizes_to_train
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import forward, load_model
from flagscale.models.student_audit import Artifacts, audit_student, load_pair
from flagscale.post_training.findings import Finding, as_text, failures, not_run, within
from flagscale.tracking import StepRun

logger = logging.getLogger(__name__)


def prove(
    artifacts: Artifacts,
    args: Arguments,
    batch: dict[str, torch.Tensor],
    unigram: float,
    logits_bsv: torch.Tensor | None,
) -> tuple[dict[str, float], list[Finding]]:
    """Audit the artifacts as they are stored. All ranks call it.

    Args:
        artifacts: the student's, and what it was made of.
        args: that it was built with.
        batch: see `audited_batch`.
        unigram: see there.
        logits_bsv: this rank's part of what the student predicted before it was stored.

    Returns:
        Figures for the manifest, and every finding.

    Raises:
        UserError: naming each check that failed, with its cause.
    """
    to_train = sizes_to_train(args.parallelism, args.shape, ModelShape.load(artifacts.teacher))
    reloaded = None
    if to_train != args.parallelism:  # where sums are made in another order
        student = load_model(
            artifacts.student, args.seq_length, args.parallelism, args.params_dtype
        )
        reloaded = _reloaded(forward(student, batch["tokens"]), logits_bsv)
        del student
    with use_args(replace(get_args(), parallelism=to_train)):
        student, teacher = load_pair(artifacts, replace(args, parallelism=to_train))
        if reloaded is None:
            reloaded = _reloaded(forward(student, batch["tokens"]), logits_bsv)
        audited = audit_student(artifacts, student, teacher, batch, unigram)
    findings = [
        reloaded,
        *audited.findings,
        not_run("TP1 equals TP2", "it takes more processes: `make doctor` runs it"),
    ]
    if is_first_rank():
        logger.info("audit of the conversion:\n%s", as_text(findings))
    if wrong := failures(findings):
        raise UserError("the audit of the conversion failed: " + "; ".join(wrong))
    return {
        "reload_logit_difference": reloaded.figure or 0.0,
        "kd_loss_when_equal": audited.kd_loss_when_equal,
        "kd_loss_at_start": audited.kd_loss_at_start,
    }, findings


def record_audit(
    findings: Sequence[Finding],
    shape: ModelShape,
    parameters: float,
    staging: Staging,
    run: StepRun,
) -> None:
    """Into the manifest's facts, and as a page. The first rank calls it.

    Args:
        findings: from `prove`.
        shape: of the student.
        parameters: how many it has.
        staging: the student's artifact.
        run: the step's in MLflow.
    """
    found = [finding.values() for finding in findings]
    staging.facts["audit"] = found
    told = f"A student of {shape.num_layers} layers, {parameters / 1e6:.1f}M parameters"
    (staging.path / AUDIT).write_text(render(found, told), encoding="utf-8")
    run.log_artifact(staging.path / AUDIT)


def _reloaded(reloaded: torch.Tensor | None, before: torch.Tensor | None) -> Finding:
    """Largest difference of the logits on any rank; must be none."""
    largest = torch.zeros((), device=platform.device())
    if reloaded is not None and before is not None:
        largest = (reloaded - before).abs().max().float().nan_to_num(math.inf)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return within(
        "saved and loaded",
        largest.item(),
        0,
        "largest difference of the student's logits",
        f"the saved student's logits differ by {largest:.3g} once loaded, not 0",
    )
