"""The loss of a micro-batch where the model is a ModelOpt distillation model."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model

from flagscale.megatron.global_vars import get_args
from flagscale.megatron.loss_checks import check_loss
from flagscale.post_training.intermediate_terms import intermediate_terms

CriterionOutput = tuple[torch.Tensor, bool, bool]  # of ModelOpt's criteria; see `masked_sum`


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor, model: GPTModel | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the distillation loss over the unmasked tokens, each term under the same mask.

    Args:
        loss_mask: [b, s]; 0 excludes a position.
        output_tensor: [b, s]; the student's LM loss (zeros while it trains on the KD loss alone).
        model: the distillation model, wrapped or not, right after its forward pass.

    Returns:
        As `flagscale.train.train_gpt.loss_func`. In training the loss is the distillation loss, in
        evaluation the LM loss; the report has `total loss` and `logits distillation loss` in
        both, `intermediate distillation loss` and `attention distillation loss` where the recipe
        has such terms, these one by one if there are several, and `lm loss` where it was computed.

    Raises:
        ValueError: no model was given.
        RuntimeError: the loss is NaN or infinite.
    """
    if model is None:
        raise ValueError("model=None: the distillation loss needs the model that computed it")
    unwrapped = unwrap_model(model)
    num_tokens = loss_mask.sum().to(torch.int)
    lm_loss = masked_sum(output_tensor, loss_mask)
    collected = unwrapped.compute_kd_loss(
        student_loss=lm_loss,
        loss_reduction_fn=lambda output: masked_sum(output, loss_mask),
        skip_balancer=True,
    )
    weighted, intermediate = intermediate_terms(unwrapped).summed(
        lambda output: masked_sum(output, loss_mask), zero=torch.zeros_like(lm_loss)
    )
    losses = unwrapped.loss_balancer({**collected, "intermediate terms": weighted})
    reported = {
        "total loss": losses["kd_loss"],
        "logits distillation loss": losses["logits_loss"],
        **intermediate,
    }
    if not (unwrapped.training and unwrapped.loss_balancer.skip_lm_loss):
        reported["lm loss"] = lm_loss
    report = {
        name: torch.stack([loss.detach().float(), num_tokens.float()])
        for name, loss in reported.items()
    }
    loss = losses["kd_loss"] if unwrapped.training else lm_loss
    check_loss(get_args(), loss)
    return loss, num_tokens, report


def masked_sum(output: torch.Tensor | CriterionOutput, loss_mask: torch.Tensor) -> torch.Tensor:
    """Sum of a per-token loss over the unmasked tokens, whole on every tensor-parallel rank.

    Args:
        output: [b, s], or ModelOpt's triple of it, whether it is this rank's share of a sum over
            the vocabulary, and whether its sequence is split over tensor-parallel ranks.
        loss_mask: [b, s], of the whole sequence.
    """
    losses, tp_reduce, is_sequence_parallel = (
        output if isinstance(output, tuple) else (output, False, False)
    )
    if is_sequence_parallel:
        rank = parallel_state.get_tensor_model_parallel_rank()
        world_size = parallel_state.get_tensor_model_parallel_world_size()
        loss_mask = torch.tensor_split(loss_mask, world_size, dim=1)[rank]
    total = torch.sum(losses.reshape(-1).float() * loss_mask.reshape(-1).float())
    if tp_reduce or is_sequence_parallel:
        total = reduce_from_tensor_model_parallel_region(total)
    return total
