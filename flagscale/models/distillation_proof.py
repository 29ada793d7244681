"""Proofs that a student converts for distillation rightly, before any long work relies on it.

They take training's own way: its `forward_step`, on Megatron-Core's schedule, on any layout. Beside
the two models they hold no more than one parameter's gradient.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.global_vars import get_args, use_args
from flagscale.models.megatron import without_multi_token_prediction
from flagscale.post_training.conversion import convert_for_distillation
from flagscale.post_training.export import plain_student
from flagscale.recipe import DistillationRecipe
from flagscale.train.auxiliary_losses import forget_auxiliary_losses
from flagscale.train.batches import reads_data
from flagscale.train.loop import reduce_reports, run_schedule

# The LM loss is part of it: against itself a model gets no gradient from the KD loss.
PROOF_LOSS = DistillationRecipe(skip_lm_loss=False)

# A model's own logits give exactly 0; what else comes is a wrong loss, nats a token.
_MAX_LOSS_WHEN_EQUAL = 1e-6
_EXPERTS = ".mlp.experts."
_TEACHER = "_teacher_model."
_ONLY_PREDICTION = "mtp."  # what multi-token prediction alone uses

Batch = dict[str, torch.Tensor]
ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


def prove_no_loss_when_equal(teacher: GPTModel, batch: Batch) -> float:
    """Prove that the KD loss of a model against itself is 0. All ranks call it.

    Called within `use_args`, of a model `with_teacher` and PROOF_LOSS.

    Args:
        teacher: this rank's part; it is frozen.
        batch: one micro-batch of the data loader, the same on every rank.

    Returns:
        The loss, nats a token.

    Raises:
        UserError: it is not 0.
    """
    model = convert_for_distillation(_twin(teacher), teacher, PROOF_LOSS)
    with torch.no_grad():
        loss = _run(model, batch, forward_only=True)["logits distillation loss"]
    plain_student(model)  # the teacher tells the twin's loss nothing any more
    if not abs(loss) <= _MAX_LOSS_WHEN_EQUAL:
        raise UserError(
            f"the KD loss of the teacher against itself is {loss:.3g} nats a token, not 0: the "
            "conversion is wrong"
        )
    return loss


def prove_every_parameter_learns(student: GPTModel, teacher: GPTModel, batch: Batch) -> float:
    """Prove that a backward pass reaches all of the student and none of the teacher.

    Multi-token prediction has no part in distillation: what only it uses must be reached by the
    plain loss. All ranks call it, within `use_args` as above.

    Args:
        student: this rank's part, its weights as training will start from; it is converted.
        teacher: this rank's part; it is frozen.
        batch: one micro-batch of the data loader, the same on every rank.

    Returns:
        The KD loss, nats a token.

    Raises:
        UserError: which parameter does not learn, or would change though it must not.
    """
    predicted: dict[str, torch.Tensor] = {}
    if get_args().shape.architecture.mtp_num_layers:
        plain = replace(get_args(), export_kd_teacher_load=None)
        with use_args(plain), _gradients(student) as seen:
            _run(student, batch)
        predicted = {name: s for name, s in seen.items() if name.startswith(_ONLY_PREDICTION)}
    with without_multi_token_prediction(student):
        model = convert_for_distillation(student, teacher, PROOF_LOSS)
        with _gradients(model) as seen:
            loss = _run(model, batch)["logits distillation loss"]
    _check(model, seen | predicted)
    return loss


def _run(model: GPTModel, batch: Batch, forward_only: bool = False) -> dict[str, float]:
    """The losses in training, nats a token, known to all ranks."""
    model.train()
    batches = iter([batch]) if reads_data(get_args()) else None
    reports = run_schedule([model], [batches], 1, forward_only)
    forget_auxiliary_losses()
    return reduce_reports(reports)


def _twin(module: ModuleT) -> ModuleT:
    """A module of its own, hooks and all, that computes with the same tensors."""
    twin = copy.copy(module)
    vars(twin).update({k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, dict)})
    twin._modules.update({name: m and _twin(m) for name, m in module._modules.items()})
    return twin


@contextlib.contextmanager
def _gradients(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Look at each gradient as soon as it is there, and let it go: they never are all there.

    Yields:
        What was seen, by name of the parameter: bool [2], whether the gradient is finite, and
        whether it is anything but zeros.
    """
    seen: dict[str, torch.Tensor] = {}

    def look(name: str, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None, "called when it is there"
        ends = torch.stack(gradient.aminmax())  # of a NaN both are; no copy is made
        seen[name] = torch.stack([ends.isfinite().all(), ends.any()])
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(look, name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check(model: GPTModel, seen: dict[str, torch.Tensor]) -> None:
    """Raise on every rank what is wrong on one, if something is. All ranks call it.

    A rank's slice of a tensor may have a gradient of zeros where the whole has not: of an
    embedding, when it has none of the batch's tokens.
    """
    own = [name for name, _ in model.named_parameters() if not name.startswith(_TEACHER)]
    untouched = torch.tensor([True, False], device=platform.device())
    found = torch.stack([seen.get(name, untouched) for name in own]).int()
    finite, anything = found[:, 0].contiguous(), found[:, 1].contiguous()
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN, group)
    torch.distributed.all_reduce(anything, torch.distributed.ReduceOp.MAX, group)
    faults = [
        f"the {_in_whole_model(model, name)} got a gradient: it would not stay as it is"
        for name, parameter in model.named_parameters()
        if name.startswith(_TEACHER)
        and (parameter.requires_grad or parameter.grad is not None or name in seen)
    ]
    for name, is_finite, is_anything in zip(own, finite.tolist(), anything.tolist(), strict=True):
        if not is_finite:
            fault = "no finite gradient"
        elif is_anything or _EXPERTS in name:  # it may be that no token chose the expert
            continue
        else:
            fault = "a gradient of zeros" if name in seen else "no gradient"
        faults.append(f"the {_in_whole_model(model, name)} got {fault}: it would not learn")
    told: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, next(iter(faults), None))
    for first in told:
        if first is not None:
            raise UserError(first)


def _in_whole_model(model: GPTModel, name: str) -> str:
    """Whose parameter it is, with its layer counted over all stages of the pipeline."""
    whose, part = "student's", model
    if name.startswith(_TEACHER):
        whose, part, name = "teacher's", model.teacher_model, name.removeprefix(_TEACHER)
    layer = re.match(r"decoder\.layers\.(\d+)", name)
    if layer:
        number = int(layer[1]) + get_transformer_layer_offset(part.config)
        name = f"decoder.layers.{number}{name[layer.end() :]}"
    return f"{whose} {name}"
