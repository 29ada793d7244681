"""Before training from teacher outputs: whether the teacher, asked again, still answers the same.

Digests say of whom an artifact is; this says that its answers belong to these samples, in this
order of positions and on this layout. The live teacher is built, run on the first micro-batch, and
gone before the student is there: the most memory is what training with the live one takes.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.layout import check_layout, sizes_for
from flagscale.megatron.shape import ModelShape
from flagscale.post_training.cached_teacher import CachedTeacher
from flagscale.post_training.divergences import SparseKL
from flagscale.post_training.findings import Finding, failures, of_all_ranks, within
from flagscale.post_training.fused_output_layer import DeferredLogits
from flagscale.post_training.linear_divergence import Terms, linear_divergence
from flagscale.post_training.model_provider import live_teacher
from flagscale.post_training.sparse_targets import SparseRows
from flagscale.teacher_outputs import TeacherOutputs
from flagscale.train.audit import AuditError
from flagscale.train.batches import ChunkBatches, get_batch
from flagscale.train.loop import run_schedule

logger = logging.getLogger(__name__)

# What the same computation differs by on another layout or with other kernels: of hidden states a
# share of their norm, of a KL nats a token. A wrong sample is off by about 1.
_COMPUTED = {32: (1e-4, 1e-5), 16: (0.05, 0.02)}
_STORED = {"bf16": 2**-8, "fp32": 0.0}  # half a unit in the last place, twice
_SHARES = 1e-3  # nats a token, of log probabilities in float16
_STANDARD_ERRORS = 6
_WHAT = "what is stored differs from what the teacher answers by more than its codec does"


def audit_outputs(args: Arguments, batches: ChunkBatches) -> None:
    """Compare the first micro-batch's answers with the live teacher's. All ranks call it.

    Args:
        args: of the run.
        batches: of its training, read by nobody else.

    Raises:
        AuditError: on all ranks, what is wrong on one.
        UserError: there is no answer to a sample, or the teacher cannot be read.
    """
    assert args.export_kd_teacher_load is not None, "called without a teacher"
    assert args.export_kd_teacher_outputs is not None, "called without teacher outputs"
    shape = ModelShape.load(args.export_kd_teacher_load)
    try:
        check_layout(shape, sizes_for(shape, args.parallelism), args.seq_length)
    except UserError as error:
        logger.warning("teacher outputs: the live teacher was not asked again: %s", error)
        return
    teacher = live_teacher(args, is_pipeline_first_stage(), is_pipeline_last_stage())
    outputs = TeacherOutputs.open(args.export_kd_teacher_outputs)
    comparison = _Comparison(teacher.to(platform.device()), outputs, shape, args)
    with torch.no_grad():
        run_schedule([teacher], batches, 1, forward_only=True, step=comparison.step)
    del teacher
    findings = of_all_ranks(comparison.findings)
    del comparison
    gc.collect()
    if platform.HAS_GPU:
        torch.cuda.empty_cache()
    if wrong := failures(findings):
        raise AuditError(
            f"{args.export_kd_teacher_outputs}: are not what {args.export_kd_teacher_load} answers "
            f"now: {'; '.join(wrong)}; make them anew"
        )
    if torch.distributed.get_rank() == 0:
        then, now = outputs.facts.params_dtype, str(args.params_dtype).removeprefix("torch.")
        logger.info(
            "teacher outputs (of the teacher in %s): asked again, in %s, it answers the same: %s",
            then,
            {"float32": "fp32", "bfloat16": "bf16"}.get(now, now),
            "; ".join(f"{f.check} {f.figure:.2g} (at most {f.tolerance:.2g})" for f in findings),
        )


class _Comparison:
    """What the schedule runs: the live teacher, and beside it what was read."""

    def __init__(
        self, teacher: GPTModel, outputs: TeacherOutputs, shape: ModelShape, args: Arguments
    ) -> None:
        self._teacher, self._outputs, self._args = teacher, outputs, args
        # Only to look answers up: what makes logits of them is the live one's.
        self._cached = CachedTeacher(shape, outputs, teacher.config, post_process=False)
        self.findings: list[Finding] = []

    def step(
        self,
        iterator: Any,  # noqa: ANN401 - the schedule's
        model: GPTModel,
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict]]]:
        """The teacher's forward pass, as `forward_step` is the student's."""
        batch = get_batch(iterator)
        packed = batch.packed_seq_params
        named = {} if packed is None else {"packed_seq_params": packed}
        # A stage that does not compute the output layer returns what goes into it: no logits.
        is_last, model.post_process = model.post_process, False
        output = model(batch.tokens, batch.position_ids, batch.attention_mask, **named)
        model.post_process = is_last
        if is_last:
            assert batch.tokens is not None, "the last stage is given a batch"
            self._cached.ask(**batch.names)
            answer = self._cached.answer(packed is not None, batch.tokens.shape)
            self.findings = [self._compare(answer, output)]
        nothing = torch.zeros((), device=platform.device())
        return output, lambda output: (nothing, nothing.int(), {})

    def _compare(self, answer: torch.Tensor | SparseRows, hidden_sbh: torch.Tensor) -> Finding:
        codec = self._outputs.codec.options
        is_fp32 = self._outputs.facts.params_dtype == "fp32"
        is_fp32 &= self._args.params_dtype == torch.float32
        of_hidden, of_kl = _COMPUTED[32 if is_fp32 else 16]
        if isinstance(answer, torch.Tensor):
            allowed = of_hidden + _STORED[codec["dtype"]]
            far = (answer.float() - hidden_sbh.float()).norm() / hidden_sbh.float().norm()
            return within("hidden states differ by a share of", far.item(), allowed, _WHAT)
        # The live teacher in a student's place: it must be no distance from itself.
        temperature, layer = codec["temperature"], self._teacher.output_layer
        tied = self._teacher.share_embeddings_and_output_weights
        weight = self._teacher.shared_embedding_or_output_weight() if tied else layer.weight
        head = DeferredLogits(layer, hidden_sbh, weight).head_input()
        terms = Terms(SparseKL(temperature), group=layer.tp_group)
        kl_n, _ = linear_divergence(
            head, answer, terms, torch.ones(len(answer), device=hidden_sbh.device)
        )
        kl_n = kl_n.double() / temperature**2
        allowed = of_kl + (_SHARES if answer.tail_n is not None else 0)
        if answer.tail_n is None:
            allowed += _STANDARD_ERRORS * kl_n.std().item() / len(kl_n) ** 0.5
        return within("KL, nats a token,", kl_n.mean().item(), allowed, _WHAT)
