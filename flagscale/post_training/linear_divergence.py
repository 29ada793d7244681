"""Output layers, divergence and cross entropy in one: no [tokens, vocabulary] buffer of any model.

Tokens go through both models' output layers in chunks. Of each chunk's logits come the losses, and
at once their gradient, of which the chunk's shares of the gradients of hidden states and weight are
made; then the next chunk takes its place (Hsu et al., Liger Kernel, arXiv 2410.10989).

So gradients are known before the loss has been differentiated. Of a sum over tokens that can be
only if each token's weight in it is known beforehand: it is an argument here, and a loss that was
made in any other way stops in the backward pass instead of getting a wrong gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from flagscale.post_training.cross_entropy import cross_entropy_and_gradient
from flagscale.post_training.divergences import Divergence, SparseKL
from flagscale.post_training.sparse_targets import SparseRows

# Of a chunk's logits, all buffers together. More tokens at once read the weights less often.
CHUNK_BYTES = {"cpu": 28 * 2**20, "cuda": 2**30}
# Of a weight's rows that a CPU multiplies few tokens with at once: all take a quarter more time.
_BLOCK_ELEMENTS = 2**19
_FLOAT32 = 4


@dataclass(frozen=True)
class HeadInput:
    """What a model's logits are made from.

    Attributes:
        hidden_nh: [N, hidden size of the model].
        weight_vh: [V, hidden size], this rank's slice of the vocabulary.
        tokens: of the slice; the columns after them are padding.
    """

    hidden_nh: torch.Tensor
    weight_vh: torch.Tensor
    tokens: int


@dataclass(frozen=True)
class Terms:
    """What is made of the logits.

    Attributes:
        divergence: of the student's from the teacher's; `SparseKL` where its rows are sparse.
        scale: of the divergence in the loss.
        labels_n: int64 [N]; None: no cross entropy.
        cross_entropy_scale: of the cross entropy in the loss.
        group: the ranks that share the vocabulary.
    """

    divergence: Divergence | SparseKL
    scale: float = 1.0
    labels_n: torch.Tensor | None = None
    cross_entropy_scale: float = 1.0
    group: dist.ProcessGroup | None = None


def linear_divergence(
    student: HeadInput, teacher: HeadInput | SparseRows, terms: Terms, weights_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence and cross entropy of every token, differentiable in the student's tensors.

    But not in any way: the loss must be `sum(weights_n * (scale * divergence_n +
    cross_entropy_scale * cross_entropy_n))`, or a multiple of it.

    The gradient of the hidden states is that of this rank's slice of the vocabulary.

    Args:
        student: its hidden states and weight get gradients where they require them.
        teacher: gets none. With sparse rows it has no output layer, and no logits.
        terms: what is computed.
        weights_n: float32 [N]; a token's weight in the loss, 0 if it is masked.

    Returns:
        Divergence and cross entropy, float32 [N], nats, the same on every rank of the group; the
        latter zeros where there are no labels.

    Raises:
        RuntimeError: in the backward pass, if the loss was another, or has been differentiated
            before.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _LinearDivergence.apply(
        student.hidden_nh,
        student.weight_vh,
        student.tokens,
        teacher,
        terms,
        weights_n,
        torch.is_grad_enabled(),
    )
    return result


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden_nh: torch.Tensor,
        weight_vh: torch.Tensor,
        tokens: int,
        teacher: HeadInput | SparseRows,
        terms: Terms,
        weights_n: torch.Tensor,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_hidden, of_weight = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        grad_hidden_nh = torch.empty_like(hidden_nh) if of_hidden else None
        # In fp32, whatever the weight is: chunks add up.
        grad_weight_vh = torch.zeros_like(weight_vh, dtype=torch.float32) if of_weight else None
        divergence_n, cross_entropy_n = (
            torch.zeros(len(hidden_nh), device=hidden_nh.device) for _ in range(2)
        )
        student = HeadInput(hidden_nh, weight_vh, tokens)
        chunks = _Chunks(student, teacher, terms)
        for rows in chunks:
            divergence_n[rows], cross_entropy_n[rows], grad_nv = chunks.losses(
                rows, of_hidden or of_weight
            )
            # Tokens are weighed where they are narrow: nothing touches all logits once more.
            weights_n1 = weights_n[rows].unsqueeze(1).to(hidden_nh.dtype)
            if grad_nv is not None and grad_hidden_nh is not None:
                _multiply(grad_nv, weight_vh, grad_hidden_nh[rows])
                grad_hidden_nh[rows] *= weights_n1
            if grad_nv is not None and grad_weight_vh is not None:
                _add_outer(grad_nv, hidden_nh[rows] * weights_n1, grad_weight_vh)
        ctx.save_for_backward(grad_hidden_nh, grad_weight_vh, weights_n)
        ctx.scale, ctx.cross_entropy_scale = terms.scale, terms.cross_entropy_scale
        ctx.weight_dtype = weight_vh.dtype
        if terms.labels_n is None:
            ctx.cross_entropy_scale = None
            ctx.mark_non_differentiable(cross_entropy_n)
        return divergence_n, cross_entropy_n

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *grad_outputs: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_nh, grad_weight_vh, weights_n = ctx.saved_tensors
        factor = _factor(grad_outputs[0], ctx.scale, weights_n)
        _check(grad_outputs[0], factor * ctx.scale, weights_n)
        if ctx.cross_entropy_scale is not None:
            _check(grad_outputs[1], factor * ctx.cross_entropy_scale, weights_n)
        # In place: autograd then notices if they are asked for twice.
        if grad_hidden_nh is not None:
            grad_hidden_nh.mul_(factor)
        if grad_weight_vh is not None:
            grad_weight_vh = grad_weight_vh.mul_(factor).to(ctx.weight_dtype)
        return grad_hidden_nh, grad_weight_vh, *[None] * 5


def _factor(grad_n: torch.Tensor, scale: float, weights_n: torch.Tensor) -> torch.Tensor:
    """What the loss was multiplied with, [1], from the gradient of the heaviest token."""
    heaviest = weights_n.abs().argmax(0, keepdim=True)  # not 0-dim: as an index it would be read
    weight = scale * weights_n[heaviest]
    return torch.where(weight == 0, 0.0, grad_n[heaviest] / weight)


def _check(grad_n: torch.Tensor, factor: torch.Tensor, weights_n: torch.Tensor) -> None:
    expected_n = factor * weights_n
    is_far = (grad_n - expected_n).abs() > 1e-4 * expected_n.abs().amax()
    torch._assert_async(  # a GPU is not waited for
        ~is_far.any(),
        "the loss of the fused output layer was differentiated in another way than its gradient "
        "was computed for: not as the sum over tokens with the weights, and of the terms with the "
        "scales, that it was given",
    )


class _Chunks:
    """Chunks of tokens, one after the other in the same buffers of logits."""

    def __init__(self, student: HeadInput, teacher: HeadInput | SparseRows, terms: Terms) -> None:
        self._student, self._teacher, self._terms = student, teacher, terms
        count, width = len(student.hidden_nh), len(student.weight_vh)
        buffers = 1 + isinstance(teacher, HeadInput) + (terms.labels_n is not None)
        self._rows = chunk_rows(count, width, buffers, student.hidden_nh.device.type)
        self._buffers = torch.empty(
            buffers, min(count, self._rows), width, device=student.hidden_nh.device
        )

    def __iter__(self) -> Iterator[slice]:
        count = len(self._student.hidden_nh)
        for start in range(0, count, self._rows):
            yield slice(start, min(start + self._rows, count))

    def losses(
        self, rows: slice, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | None]:
        """A chunk's divergence, its cross entropy, and the gradient of both with their scales."""
        terms = self._terms
        cross_entropy_n: torch.Tensor | float = 0.0
        student_nv, *more = (b[: rows.stop - rows.start] for b in self._buffers)
        _logits(self._student, rows, student_nv)
        teacher_rows: Any  # what the divergence is of
        if isinstance(self._teacher, HeadInput):
            teacher_rows = _logits(self._teacher, rows, more.pop())
        else:
            teacher_rows = self._teacher[rows]
        cross_entropy_nv = None
        if terms.labels_n is not None:
            cross_entropy_nv = more.pop().copy_(student_nv)
            cross_entropy_n = cross_entropy_and_gradient(
                cross_entropy_nv, terms.labels_n[rows], terms.group, with_gradient=with_gradient
            )
        divergence_n, grad_nv = terms.divergence.loss_and_gradient(
            student_nv, teacher_rows, terms.group, with_gradient=with_gradient
        )
        if grad_nv is None:
            return divergence_n, cross_entropy_n, None
        if terms.scale != 1:
            grad_nv.mul_(terms.scale)
        if cross_entropy_nv is not None:
            grad_nv.add_(cross_entropy_nv, alpha=terms.cross_entropy_scale)
        grad_nv[:, self._student.tokens :] = 0  # the padding's logits are no function of anything
        return divergence_n, cross_entropy_n, grad_nv


def chunk_rows(count: int, width: int, buffers: int, device: str) -> int:
    """Tokens a chunk, all chunks as equal as can be.

    Args:
        count: tokens.
        width: of the vocabulary's slice.
        buffers: of logits.
        device: `cuda` or `cpu`.
    """
    most = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (_FLOAT32 * buffers * width))
    return math.ceil(count / math.ceil(count / most)) if count else 1


def _logits(head: HeadInput, rows: slice, out_nv: torch.Tensor) -> torch.Tensor:
    """Write a chunk's logits, in fp32 whatever the model computes in, and give them back."""
    hidden_nh, weight_vh = head.hidden_nh[rows], head.weight_vh
    if weight_vh.is_cuda and weight_vh.dtype == torch.float32:
        torch.mm(hidden_nh, weight_vh.t(), out=out_nv)
    elif weight_vh.is_cuda:
        torch.mm(hidden_nh, weight_vh.t(), out_dtype=torch.float32, out=out_nv)
    else:
        for columns, block_vh in _blocks(weight_vh):
            torch.mm(hidden_nh.float(), block_vh.t(), out=out_nv[:, columns])
    out_nv[:, head.tokens :] = -math.inf  # as divergences know what is no token
    return out_nv


def _multiply(grad_nv: torch.Tensor, weight_vh: torch.Tensor, out_nh: torch.Tensor) -> None:
    """Write a chunk's gradient of the hidden states."""
    if weight_vh.dtype == torch.float32:
        torch.mm(grad_nv, weight_vh, out=out_nh)
    elif weight_vh.is_cuda:
        torch.mm(grad_nv.to(weight_vh.dtype), weight_vh, out=out_nh)
    else:
        total_nh = torch.zeros_like(out_nh, dtype=torch.float32)
        for columns, block_vh in _blocks(weight_vh):
            total_nh.addmm_(grad_nv[:, columns], block_vh)
        out_nh.copy_(total_nh)


def _add_outer(grad_nv: torch.Tensor, hidden_nh: torch.Tensor, total_vh: torch.Tensor) -> None:
    """Add a chunk's gradient of the weight, in fp32."""
    if hidden_nh.is_cuda and hidden_nh.dtype != torch.float32:
        grad_vn = grad_nv.to(hidden_nh.dtype).t()
        torch.addmm(total_vh, grad_vn, hidden_nh, out_dtype=torch.float32, out=total_vh)
    else:
        total_vh.addmm_(grad_nv.t(), hidden_nh.float())


def _blocks(weight_vh: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A weight in fp32, block by block."""
    step = max(1, _BLOCK_ELEMENTS // weight_vh.size(1))
    for start in range(0, len(weight_vh), step):
        columns = slice(start, min(start + step, len(weight_vh)))
        yield columns, weight_vh[columns].float()
