"""The three core functions: how a model is built, what its loss is, what a step forward is.

Every step of the pipeline that runs a model goes through these, with Megatron's calling convention:
`model_provider` for a chunk of a model, `forward_step` as the function that Megatron-Core's
schedules call, `loss_func` as what it returns. They read the run's arguments from
`flagscale.megatron.global_vars`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Optional, Union, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import StragglerDetector, unwrap_model

from flagscale.megatron.dualpipev import dualpipev_layout
from flagscale.megatron.global_vars import get_args, get_timers
from flagscale.megatron.gpt_builder import build_gpt_model, build_legacy_gpt_model
from flagscale.megatron.loss_checks import check_loss
from flagscale.megatron.memory_history import record_memory_history
from flagscale.post_training.arguments import modelopt_args_enabled
from flagscale.post_training.loss_func import loss_func as loss_func_modelopt
from flagscale.post_training.model_provider import model_provider as model_provider_modelopt
from flagscale.post_training.model_provider import with_quantizers
from flagscale.train.batches import Batch, get_batch

if TYPE_CHECKING:
    import megatron.legacy.model

stimer = StragglerDetector()


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: Optional[int] = None,
    is_dualpipev_first_chunk: Optional[bool] = False,
) -> Union[GPTModel, megatron.legacy.model.GPTModel]:
    """Build one chunk of the model that the run's arguments describe.

    With ModelOpt arguments it is the student converted for distillation, its teacher inside;
    otherwise a standard GPT model, or Megatron-LM's legacy one (`use_legacy_models`).

    Args:
        pre_process: the chunk computes the embedding.
        post_process: the chunk computes the output layer and the loss.
        vp_stage: which virtual pipeline stage, with an interleaved pipeline.
        is_dualpipev_first_chunk: with `use_dualpipev`, whether the chunk is the first of the rank's
            two.

    Raises:
        ValueError: a combination that would be built wrongly.
        UserError: the legacy model's package is missing, or memory is to be recorded without a GPU.
    """
    args = get_args()
    if modelopt_args_enabled(args):
        if vp_stage is not None or is_dualpipev_first_chunk:
            raise ValueError(
                f"vp_stage={vp_stage}, is_dualpipev_first_chunk={is_dualpipev_first_chunk}: "
                "ModelOpt's distillation knows one chunk a rank; must be None and False"
            )
        return model_provider_modelopt(pre_process, post_process)
    if args.record_memory_history:
        record_memory_history(args.memory_snapshot_path)
    layout = None
    if args.use_dualpipev:
        first = bool(is_dualpipev_first_chunk)
        layout = dualpipev_layout(args, pre_process, post_process, vp_stage, first)
    elif is_dualpipev_first_chunk:
        raise ValueError("is_dualpipev_first_chunk=True with use_dualpipev=False: must be False")
    if args.use_legacy_models:
        if vp_stage is not None:
            raise ValueError(f"vp_stage={vp_stage} with use_legacy_models=True: must be None")
        return build_legacy_gpt_model(args, pre_process, post_process)
    return with_quantizers(build_gpt_model(args, pre_process, post_process, vp_stage, layout), args)


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor, model: Optional[GPTModel] = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one micro-batch: sums and counts, which the schedule normalises.

    Args:
        loss_mask: [b, s]; 0 excludes a position.
        output_tensor: [b, s]; each token's LM loss, nats.
        model: the model that computed it, wrapped or not; the distillation loss asks it for the
            teacher's part.

    Returns:
        The summed loss to differentiate (0-dim), the number of unmasked tokens (0-dim int32), and
        for each reported loss a tensor `[sum, count]`, to be reduced over data-parallel ranks.

    Raises:
        RuntimeError: the loss is NaN or infinite, where `check_for_nan_in_loss_and_grad` is set.
    """
    args = get_args()
    if modelopt_args_enabled(args):
        return loss_func_modelopt(loss_mask, output_tensor, model=model)
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output_tensor.reshape(-1).float() * mask)
    check_loss(args, loss)
    num_tokens = mask.sum().to(torch.int)
    report = {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
    return loss, num_tokens, report


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: GPTModel,
    return_schedule_plan: bool = False,
) -> tuple[Any, partial[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]]:
    """Run the model on the next micro-batch; the schedule calls it.

    Args:
        data_iterator: see `flagscale.train.batches.get_batch`.
        model: wrapped or not.
        return_schedule_plan: give the schedule a plan of the layers to run instead of running them
            (it then overlaps one micro-batch's communication with another's computation).

    Returns:
        The model's output and the loss function of it. The output is each token's LM loss,
        [b, s / CP], on the last pipeline stage, hidden states, [s / CP, b, h], on others, or the
        schedule plan.

    Raises:
        ValueError: a schedule plan was asked for without `overlap_moe_expert_parallel_comm`.
    """
    args = get_args()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        # Only a chunk of an interleaved pipeline has a stage.
        vp_stage = getattr(unwrap_model(model), "vp_stage", None)
        where = (vp_stage,) if isinstance(vp_stage, int) else ()
        batch = Batch(*get_batch(data_iterator, *where))
    timers("batch-generator").stop()
    inputs = (batch.tokens, batch.position_ids, batch.attention_mask)
    # Megatron-LM's legacy models know no loss mask.
    named: dict[str, Any] = {} if args.use_legacy_models else {"loss_mask": batch.loss_mask}
    if batch.packed_seq_params is not None:
        named["packed_seq_params"] = batch.packed_seq_params
    # Without names a teacher that is looked up says so; no other model knows of them.
    looks_up = batch.samples is not None and args.export_kd_teacher_outputs is not None
    if looks_up and unwrap_model(model).post_process:
        named |= batch.names
    run = model
    if return_schedule_plan:
        if not args.overlap_moe_expert_parallel_comm:
            raise ValueError(
                "return_schedule_plan=True needs overlap_moe_expert_parallel_comm=True"
            )
        run = model.build_schedule_plan
    with stimer:
        output_tensor = run(*inputs, labels=batch.labels, **named)
    # The model goes along, so that the loss can reach the teacher. Without a mask, none is asked.
    return output_tensor, partial(loss_func, cast(torch.Tensor, batch.loss_mask), model=model)
