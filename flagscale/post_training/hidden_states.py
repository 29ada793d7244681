"""How two hidden states are compared, token by token: in fp32, whatever the models compute in.

In bf16 a cosine near 1 is a multiple of 2^-8, and the gradient, a difference of nearly equal
vectors, is mostly rounding: the closer the student, the wronger its direction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel

from flagscale.megatron.paired_layers import HiddenPair

Fit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mse(student_sbc: torch.Tensor, teacher_sbc: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of a token's channels (FitNets, arXiv 1412.6550).

    Args:
        student_sbc: [s, b, channels].
        teacher_sbc: the same shape.

    Returns:
        [s, b], float32.
    """
    return (student_sbc.float() - teacher_sbc.float()).square().mean(dim=-1)


def cosine(student_sbc: torch.Tensor, teacher_sbc: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the two vectors of a token (DistilBERT, arXiv 1910.01108).

    Args:
        student_sbc: [s, b, channels].
        teacher_sbc: the same shape.

    Returns:
        [s, b], float32.
    """
    return 1 - F.cosine_similarity(student_sbc.float(), teacher_sbc.float(), dim=-1)


FITS: dict[str, Fit] = {"cosine": cosine, "mse": mse}


def hidden_loss(
    pair: HiddenPair,
    student_sbc: torch.Tensor,
    teacher_sbc: torch.Tensor,
    projection: torch.nn.Linear | None,
) -> torch.Tensor:
    """How far a pair's outputs are apart, token by token.

    Args:
        pair: whose fit it is.
        student_sbc: the student's output.
        teacher_sbc: the teacher's, of its own width.
        projection: from the one width to the other.

    Returns:
        [s, b], float32.

    Raises:
        RuntimeError: the channels do not meet; one of them would be compared with all.
    """
    widths = student_sbc.size(-1), teacher_sbc.size(-1)
    meets = widths[:1] * 2
    if projection is not None:
        meets = projection.in_features, projection.out_features
    if widths != meets:
        has = "none" if projection is None else "one from {} to {}".format(*meets)
        raise RuntimeError(
            f"{pair.name}: {widths[0]} channels of the student need a projection to {widths[1]} of "
            f"the teacher, but there is {has}"
        )
    if projection is not None:
        student_sbc = projection(student_sbc)
    return FITS[pair.fit](student_sbc, teacher_sbc)


def projection_of(student: GPTModel, pair: HiddenPair, seed: int) -> torch.nn.Linear:
    """From the student's width to the teacher's; weights as the student's, the bias zeros."""
    linear = torch.nn.Linear(pair.student.width, pair.teacher.width)
    with torch.random.fork_rng(devices=[]):
        # The GPU's generator, not forked, stays as it is.
        torch.default_generator.manual_seed(seed)
        student.config.init_method(linear.weight.data)
    torch.nn.init.zeros_(linear.bias)
    for parameter in linear.parameters():
        # Each rank sees its share of the positions; Megatron-Core then adds the gradients up.
        parameter.sequence_parallel = student.config.sequence_parallel  # type: ignore[attr-defined]
    return linear
