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
from typing import TYPE_CHECKING, TypeVar

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
from flagscale.post_training.tap import Seen, Tap
from flagscale.recipe import DistillationRecipe
from flagscale.train.auxiliary_losses import forget_auxiliary_losses
from flagscale.train.batches import reads_data
from flagscale.train.schedule import reduce_reports, run_schedule
from flagscale.train.train_gpt import forward_step

if TYPE_CHECKING:
    from flagscale.post_training.upstream import mtd

# The LM loss is part of it: against itself a model gets no gradient from the KD loss.
PROOF_LOSS = DistillationRecipe(skip_lm_loss=False)

_EXPERTS = ".mlp.experts."
_TEACHER = "_teacher_model."
_ONLY_PREDICTION = "mtp."  # what multi-token prediction alone uses

Batch = dict[str, torch.Tensor]
ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


def prove_every_parameter_learns(
    student: GPTModel, teacher: GPTModel, batch: Batch
) -> tuple[float, Seen | None]:
    """Prove that a backward pass reaches all of the student and none of the teacher.

    Multi-token prediction has no part in distillation: what only it uses must be reached by the
    plain loss. All ranks call it, within `use_args` of a model `with_teacher` and PROOF_LOSS.

    Args:
        student: this rank's part, its weights as training will start from.
        teacher: this rank's part; it is frozen.
        batch: one micro-batch of the data loader, the same on every rank.

    Returns:
        The KD loss, nats a token, and what was seen of it on the last pipeline stage.

    Raises:
        UserError: which parameter does not learn, or would change though it must not.
    """
    predicted: dict[str, torch.Tensor] = {}
    if get_args().shape.architecture.mtp_num_layers:
        plain = replace(get_args(), export_kd_teacher_load=None)
        with use_args(plain), _gradients(student) as seen:
            run(student, batch)
        predicted = {name: s for name, s in seen.items() if name.startswith(_ONLY_PREDICTION)}
    with distilling(student, teacher, PROOF_LOSS) as model:
        with _gradients(model) as seen:
            losses, tapped = run(model, batch)
        _check(model, seen | predicted)
    return losses["logits distillation loss"], tapped


@contextlib.contextmanager
def distilling(
    student: GPTModel, teacher: GPTModel, recipe: DistillationRecipe
) -> Iterator[mtd.DistillationModel]:
    """The two as a distillation model, for the body; afterwards plain models again.

    Multi-token prediction has no part in it.
    """
    with (
        without_multi_token_prediction(student),
        use_args(replace(get_args(), export_kd_cfg=recipe)),
    ):
        model = convert_for_distillation(student, teacher, recipe)
        try:
            yield model
        finally:
            plain_student(model)


def run(
    model: GPTModel,
    batch: Batch,
    *,
    forward_only: bool = False,
    training: bool = True,
    tap: Tap | None = None,
) -> tuple[dict[str, float], Seen | None]:
    """One micro-batch training's own way. All ranks call it.

    Args:
        model: this rank's part, plain or converted.
        batch: of the data loader, the same on every rank.
        forward_only: no backward pass.
        training: the mode.
        tap: of the model, that is to look; default: a plain one.

    Returns:
        The losses, nats a token, known to all ranks; and what was seen of them, on the last stage.
    """
    model.train(training)
    batches = iter([batch]) if reads_data(get_args()) else None
    with (tap or Tap(model)).open() as tap:
        reports = run_schedule([model], [batches], 1, forward_only, tap.around(forward_step))
    forget_auxiliary_losses()
    return reduce_reports(reports), tap.seen


def twin(module: ModuleT) -> ModuleT:
    """A module of its own, hooks and all, that computes with the same tensors."""
    made = copy.copy(module)
    vars(made).update({k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, dict)})
    made._modules.update({name: m and twin(m) for name, m in module._modules.items()})
    return made


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
