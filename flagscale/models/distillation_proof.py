"""Proofs that a student converts for distillation rightly, before any long work relies on it."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.errors import UserError
from flagscale.models.megatron import without_multi_token_prediction
from flagscale.post_training.conversion import convert_for_distillation
from flagscale.post_training.loss_func import loss_func
from flagscale.recipe import DistillationRecipe

# A model's own logits give exactly 0; what else comes is a wrong loss, nats a token.
_MAX_LOSS_WHEN_EQUAL = 1e-6
_EXPERTS = ".mlp.experts."


def prove_distillation(
    student: GPTModel, teacher: GPTModel, twin: GPTModel, batch: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Prove ModelOpt's conversion on models that are not needed afterwards.

    That the KD loss of a model against itself is 0, and that one backward pass reaches every
    parameter of the student and none of the teacher. Multi-token prediction has no part in
    distillation: what only it uses must be reached by the plain loss.

    Called within `use_args`, of the student's arguments.

    Args:
        student: its weights as training will start from; it is converted.
        teacher: it is frozen.
        twin: a second copy of the teacher; it is converted.
        batch: one micro-batch of the data loader.

    Returns:
        `kd_loss_when_equal` and `kd_loss_at_start`, nats a token.

    Raises:
        UserError: a proof failed, and which parameter or number shows it.
    """
    _, when_equal, _ = _losses(twin, teacher, batch)
    if not abs(when_equal) <= _MAX_LOSS_WHEN_EQUAL:
        raise UserError(
            f"the KD loss of the teacher against itself is {when_equal:.3g} nats a token, "
            "not 0: the conversion is wrong"
        )
    if student.mtp_process:
        inputs = batch["tokens"], batch["position_ids"], None
        student.train()(*inputs, labels=batch["labels"]).sum().backward()
    with without_multi_token_prediction(student):
        loss, at_start, model = _losses(student, teacher, batch)
        loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("_teacher_model."):
            if parameter.requires_grad or parameter.grad is not None:
                raise UserError(f"the teacher's {name} got a gradient: it would not stay as it is")
        elif _EXPERTS in name and (parameter.grad is None or not parameter.grad.any()):
            continue  # no token of this batch chose the expert
        elif parameter.grad is None or not parameter.grad.isfinite().all():
            raise UserError(f"the student's {name} got no finite gradient: it would not learn")
        elif not parameter.grad.any():
            raise UserError(f"the student's {name} got a gradient of zeros: it would not learn")
    if any(parameter.grad is not None for parameter in teacher.parameters()):
        raise UserError("the teacher got a gradient: it would not stay as it is")
    return {"kd_loss_when_equal": when_equal, "kd_loss_at_start": at_start}


def _losses(
    student: GPTModel, teacher: GPTModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, float, GPTModel]:
    """A total loss to differentiate, the KD loss in it (nats a token), the converted model.

    The LM loss is part of the total: against itself a model gets no gradient from the KD loss.
    """
    model = convert_for_distillation(student, teacher, DistillationRecipe(skip_lm_loss=False))
    model.train()
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    loss, num_tokens, report = loss_func(batch["loss_mask"], output, model=model)
    kd_loss, _ = report["logits distillation loss"]
    return loss, (kd_loss / num_tokens).item(), model
