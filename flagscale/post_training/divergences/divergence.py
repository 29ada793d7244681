"""What a divergence is: a value and a gradient for each pair of rows of logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from flagscale.post_training.divergences.passing import one_pass, scale_rows
from flagscale.post_training.divergences.rows import Rows, gathered, is_shared, merged


class Divergence(ABC):
    """`T^2 * D(p, q)` of rows `p = softmax(t / T)`, the teacher's, and `q = softmax(s / T)`.

    `T^2` is Hinton's (arXiv 1503.02531): it keeps the gradient's size independent of the
    temperature. In autograd a divergence would hold about eight buffers of the logits' size; here
    rows are worked off in chunks, value and gradient in one go, and the gradient overwrites the
    student's logits, which nothing else needs any more.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        """Keep the temperature.

        Args:
            temperature: divides both models' logits.

        Raises:
            ValueError: it is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        self.temperature = temperature

    def __call__(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Every row's divergence, differentiable in the student's logits.

        Where a gradient will be wanted, **the student's logits are overwritten at once**: whoever
        else reads them does so before. A second backward pass raises.

        Args:
            student_logits: [..., V], V the vocabulary of this rank; float32 or bfloat16.
            teacher_logits: the same shape; gets no gradient.
            group: the ranks that share the vocabulary; None or of size 1: V is all of it.

        Returns:
            float32 [...], nats, the same on every rank of `group`.

        Raises:
            ValueError: the shapes differ.
        """
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student logits {tuple(student_logits.shape)} and teacher logits "
                f"{tuple(teacher_logits.shape)} must have one shape: is the vocabulary the same?"
            )
        teacher_nv = teacher_logits.detach().view(-1, teacher_logits.size(-1))
        return differentiable(self, student_logits, teacher_nv, group)

    @torch.no_grad()
    def loss_and_gradient(
        self,
        student_nv: torch.Tensor,
        teacher_nv: torch.Tensor,
        group: dist.ProcessGroup | None = None,
        *,
        with_gradient: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both at once.

        Args:
            student_nv: [N, V], V the vocabulary of this rank; overwritten by the gradient.
            teacher_nv: the same shape.
            group: the ranks that share the vocabulary; None or of size 1: V is all of it.
            with_gradient: False leaves the student's logits as they are.

        Returns:
            float32 [N], the same on every rank of `group`, and its derivative by the student's
            logits: `student_nv`, or None.
        """
        loss_n = self._work(student_nv, teacher_nv, group, with_gradient)
        return loss_n.mul_(self.temperature**2), student_nv if with_gradient else None

    @abstractmethod
    def _work(
        self,
        student_nv: torch.Tensor,
        teacher_nv: torch.Tensor,
        group: dist.ProcessGroup | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        """As `loss_and_gradient`, but the loss is `D` without `T^2`; the gradient is whole."""


class FDivergence(Divergence):
    """A sum over the vocabulary of a function of p and q.

    Under tensor parallelism it takes two collectives: what a column adds depends on both
    normalisers of the whole vocabulary, in a way that no few sums over a slice can stand for.
    """

    number_of_sums = 1

    @abstractmethod
    def sums(self, rows: Rows) -> torch.Tensor:
        """Sums over the columns, [S, n]: the divergence, and what else its gradient needs."""

    @abstractmethod
    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """`dD/dz` [n, V], z the student's scaled logits, given the `sums` of whole rows.

        With g the derivative of D by q, it is `q (g - sum q g)`.
        """

    def _work(
        self,
        student_nv: torch.Tensor,
        teacher_nv: torch.Tensor,
        group: dist.ProcessGroup | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        run = partial(one_pass, self, student_nv, teacher_nv)
        if not is_shared(group):
            return run(with_gradient=with_gradient)[1][0]
        norms, sums = self._of_whole(run, group)
        if with_gradient:
            run(norms, sums, with_gradient=True)
        return sums[0]

    def _of_whole(
        self, run: Callable[..., tuple[torch.Tensor, torch.Tensor]], group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalisers and sums of the vocabulary that the ranks share."""
        norms, _ = merged(gathered(run(with_sums=False)[0], group), self.temperature)
        _, sums = run(norms)
        dist.all_reduce(sums, group=group)
        return norms, sums


class ChainRule(FDivergence):
    """A divergence of the whole that follows from those of its parts: one collective.

    The chain rule of KL: over a vocabulary cut into slices it is the divergence of the slices'
    shares, plus each slice's own, weighed with its share. Nothing is lost near zero.
    """

    @abstractmethod
    def weights(self, shares: Rows) -> torch.Tensor:
        """Which of the two distributions' shares weigh."""

    def _of_whole(
        self, run: Callable[..., tuple[torch.Tensor, torch.Tensor]], group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        everywhere = gathered(torch.cat(run()), group)
        norms, (log_p_rn, log_q_rn) = merged(everywhere[:, :4], self.temperature)
        shares = Rows.of_shares(log_p_rn.T, log_q_rn.T)
        weights, own = self.weights(shares), everywhere[:, 4].T
        within = torch.where(weights > 0, weights * own, 0).sum(-1)
        return norms, self.sums(shares) + within


def differentiable(
    divergence: Any,  # noqa: ANN401 - whatever has a `loss_and_gradient` of such a teacher
    student_logits: torch.Tensor,
    teacher_rows: Any,  # noqa: ANN401
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Every row's divergence, float32 [...], differentiable in the student's logits [..., V].

    Where a gradient will be wanted, they are overwritten at once.

    Args:
        divergence: makes loss and gradient in one go.
        student_logits: [..., V], N rows.
        teacher_rows: the teacher's N rows, as the divergence wants them.
        group: the ranks that share the vocabulary.
    """
    wanted = torch.is_grad_enabled() and student_logits.requires_grad
    result: torch.Tensor = _Loss.apply(student_logits, teacher_rows, divergence, group, wanted)
    return result


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        student_logits: torch.Tensor,
        teacher_rows: Any,  # noqa: ANN401
        divergence: Any,  # noqa: ANN401
        group: dist.ProcessGroup | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        # Through detach, not .data: autograd then notices that the logits are gone.
        student_nv = student_logits.detach().view(-1, student_logits.size(-1))
        loss_n, ctx.gradient_nv = divergence.loss_and_gradient(
            student_nv, teacher_rows, group, with_gradient=with_gradient
        )
        ctx.shape = student_logits.shape
        return loss_n.view(student_logits.shape[:-1])

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        *grad_outputs: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        gradient_nv, ctx.gradient_nv = ctx.gradient_nv, None
        if gradient_nv is None:
            raise RuntimeError("the gradient was given away by an earlier backward pass")
        scale_rows(gradient_nv, grad_outputs[0].reshape(-1))
        return gradient_nv.view(ctx.shape), None, None, None, None
