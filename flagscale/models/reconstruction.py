"""Fits the layers that a student keeps to what the teacher made of the same text, in closed form.

Without some layers, each later one is given other states than it has learnt from, and the error
grows from layer to layer. So each kept layer's last matrix, the MLP's down projection, is moved to
where it puts out what the teacher feeds its next kept layer: a ridge regression on what the MLP's
first half gives, layer after layer, on states of the student as it is by then. ReplaceMe (arXiv
2505.02819) fits a linear map on the same matrix' output; that the error of earlier layers is part
of what later ones are fitted to is ThiNet's idea (arXiv 1707.06342).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from flagscale.models.megatron import hidden_states

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """How well a layer puts out what it should.

    Attributes:
        before: mean over tokens of |output - target|^2 / |target|^2, of the teacher's weights.
        after: the same once they are fitted, on the same text.
    """

    before: float
    after: float


@torch.no_grad()
def layer_targets(
    teacher: GPTModel, tokens_bs: torch.Tensor, kept: Sequence[int]
) -> list[torch.Tensor]:
    """What each kept layer should put out: what the teacher feeds the next one, or its output.

    All ranks call it, and get all.

    Args:
        teacher: from `load_model`, not wrapped; no sequence parallelism.
        tokens_bs: int64, the same on every rank.
        kept: layers, from 0, rising.

    Returns:
        For each, [s, b, h] in the teacher's dtype.
    """
    wanted = [*(layer - 1 for layer in kept[1:]), teacher.config.num_layers - 1]
    found: dict[int, torch.Tensor] = {}

    def after(layer: Any, _inputs: Any, output: Any) -> None:  # noqa: ANN401
        if layer.layer_number - 1 in wanted:
            found[layer.layer_number - 1] = output[0]

    hooks = [layer.register_forward_hook(after) for layer in teacher.decoder.layers]
    try:
        hidden_states(teacher, tokens_bs)
    finally:
        for hook in hooks:
            hook.remove()
    return [_of_any_stage(found.get(layer), teacher, tokens_bs) for layer in wanted]


def _of_any_stage(
    states_sbh: torch.Tensor | None, model: GPTModel, tokens_bs: torch.Tensor
) -> torch.Tensor:
    """On every rank what one stage of the pipeline has."""
    group = parallel_state.get_pipeline_model_parallel_group()
    owners: list[bool] = [False] * group.size()
    torch.distributed.all_gather_object(owners, states_sbh is not None, group=group)
    if states_sbh is None:
        like = next(model.parameters())
        batch_size, seq_length = tokens_bs.shape
        states_sbh = like.new_empty(seq_length, batch_size, model.config.hidden_size)
    states_sbh = states_sbh.contiguous()
    source = torch.distributed.get_global_rank(group, owners.index(True))
    torch.distributed.broadcast(states_sbh, source, group=group)
    return states_sbh


@torch.no_grad()
def reconstruct(
    student: GPTModel, tokens_bs: torch.Tensor, targets: Sequence[torch.Tensor], ridge: float
) -> list[Fit]:
    """Fit every layer in place, the first one first. All ranks call it, and get the same.

    Args:
        student: this rank's part, with the teacher's weights; layers with one dense MLP each.
        tokens_bs: int64, the same on every rank.
        targets: of each layer, from `layer_targets` of the same text.
        ridge: how much a change of weights costs, as a share of the inputs' mean square.
    """
    fits: dict[int, Fit] = {}
    given: list[torch.Tensor] = []

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:  # noqa: ANN401
        given.append(inputs[0])

    def fit(layer: Any, _inputs: Any, output: Any) -> Any:  # noqa: ANN401
        number = layer.layer_number - 1
        changed, fits[number] = _fit(
            layer.mlp.linear_fc2.weight, given.pop(), output[0], targets[number], ridge
        )
        return (changed, *output[1:])

    hooks = []
    for layer in student.decoder.layers:
        hooks.append(layer.mlp.linear_fc2.register_forward_pre_hook(keep))
        hooks.append(layer.register_forward_hook(fit))
    try:
        hidden_states(student, tokens_bs)
    finally:
        for hook in hooks:
            hook.remove()
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[int, Fit]] = [{}] * group.size()
    torch.distributed.all_gather_object(stages, fits, group=group)
    every = {number: found for stage in stages for number, found in stage.items()}
    return [every[number] for number in sorted(every)]


def _fit(
    weight: torch.Tensor,
    inputs_sbf: torch.Tensor,
    output_sbh: torch.Tensor,
    target_sbh: torch.Tensor,
    ridge: float,
) -> tuple[torch.Tensor, Fit]:
    """Change `weight` [h, f / TP]; return the layer's output with the changed one.

    Of each token the error counts as a share of its target's size: the first token's is a thousand
    times as large as others'.
    """
    inputs_nf = gather_from_tensor_model_parallel_region(inputs_sbf).flatten(0, 1).float()
    output_nh, target_nh = (x.flatten(0, 1).float() for x in (output_sbh, target_sbh))
    scale_n1 = target_nh.norm(dim=-1, keepdim=True).clamp(min=1e-30).reciprocal()
    scaled_nf, error_nh = inputs_nf * scale_n1, (target_nh - output_nh) * scale_n1
    change_fh = _ridge(scaled_nf, error_nh, ridge)
    own = weight.size(1)
    first = parallel_state.get_tensor_model_parallel_rank() * own
    weight.data += change_fh[first : first + own].T.to(weight.dtype)
    left_nh = error_nh - scaled_nf @ change_fh
    fit = Fit(*(x.pow(2).sum(-1).mean().item() for x in (error_nh, left_nh)))
    changed_nh = output_nh + inputs_nf @ change_fh
    return changed_nh.view_as(output_sbh).to(output_sbh.dtype), fit


def _ridge(inputs_nf: torch.Tensor, error_nh: torch.Tensor, ridge: float) -> torch.Tensor:
    """Argmin over D [f, h] of |X D - E|^2 + r |D|^2, r = ridge x the mean diagonal of X^T X.

    By the smaller of the two equal forms, (X^T X + r)^-1 X^T E and X^T (X X^T + r)^-1 E.
    """
    count, width = inputs_nf.shape
    penalty = ridge * inputs_nf.pow(2).sum().double() / width
    products = inputs_nf.T @ inputs_nf if width <= count else inputs_nf @ inputs_nf.T
    products = products.double()
    products.diagonal().add_(penalty.clamp(min=1e-30))
    factor = torch.linalg.cholesky(products)
    if width <= count:
        return torch.cholesky_solve((inputs_nf.T @ error_nh).double(), factor).float()
    return inputs_nf.T @ torch.cholesky_solve(error_nh.double(), factor).float()
