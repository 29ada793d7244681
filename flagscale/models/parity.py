"""Proofs that two models are the same: logits on a fixed text, parameter counts, sane weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import logits

FIXED_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969, two people walked on the Moon; a third "
    "stayed in orbit. `def area(radius): return 3.14159 * radius ** 2` computes the area of a "
    "circle. Water boils at 100 degrees Celsius (212 degrees Fahrenheit) at sea level, and an "
    "encyclopaedia is a book, or a set of books, that has facts on many subjects."
)


@dataclass(frozen=True)
class Parity:
    """How far the logits of two models are apart.

    Attributes:
        max_abs_difference: largest |difference| of any logit.
        mean_abs_difference: mean |difference|.
        top1_agreement: share of positions where both predict the same token.
        num_tokens: positions compared.
    """

    max_abs_difference: float
    mean_abs_difference: float
    top1_agreement: float
    num_tokens: int


def fixed_tokens(tokenizer: PreTrainedTokenizerFast, seq_length: int) -> torch.Tensor:
    """The fixed text as tokens, int64 [1, s] with s at most `seq_length`."""
    ids = tokenizer(FIXED_TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids[:seq_length]], dtype=torch.int64)


@torch.no_grad()
def hf_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """float32 logits [b, s, vocabulary] of a transformers model for int64 `tokens` [b, s]."""
    return model(input_ids=tokens.to(model.device), use_cache=False).logits.float()


def compare_logits(first_bsv: torch.Tensor, second_bsv: torch.Tensor) -> Parity:
    """Compare logits [b, s, vocabulary] of the same tokens.

    Raises:
        ValueError: the shapes differ.
    """
    if first_bsv.shape != second_bsv.shape:
        raise ValueError(f"logits of shapes {first_bsv.shape} and {second_bsv.shape}")
    difference = (first_bsv - second_bsv.to(first_bsv.device)).abs()
    agree = first_bsv.argmax(-1) == second_bsv.to(first_bsv.device).argmax(-1)
    return Parity(
        max_abs_difference=difference.max().item(),
        mean_abs_difference=difference.mean().item(),
        top1_agreement=agree.float().mean().item(),
        num_tokens=agree.numel(),
    )


def logit_difference(
    megatron_model: GPTModel, hf_model: PreTrainedModel, tokens: torch.Tensor
) -> Parity:
    """Compare a Megatron-Core model with a transformers model on int64 `tokens` [b, s]."""
    return compare_logits(logits(megatron_model, tokens), hf_logits(hf_model, tokens))


def check_logits(parity: Parity, limit: float, where: str) -> None:
    """Refuse logits that are further apart than `limit`, or not numbers.

    Args:
        parity: what was measured.
        limit: largest |difference| that is accepted.
        where: the recipe's field that holds the limit.

    Raises:
        UserError: naming the difference and the limit.
    """
    if not parity.max_abs_difference <= limit:  # NaN is not
        raise UserError(
            f"{where}={limit:g}: the logits differ by {parity.max_abs_difference:.3g} from "
            f"transformers' (mean {parity.mean_abs_difference:.3g}, the same top token at "
            f"{parity.top1_agreement:.1%} of {parity.num_tokens} positions)"
        )


def check_weights(model: torch.nn.Module, what: str) -> None:
    """Refuse weights that no trained model has. Biases may be all zero.

    Raises:
        UserError: a weight is all zero, or holds NaN or infinity; names the first.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{what}: {name} holds values that are not finite")
        if not name.endswith("bias") and not parameter.any():
            raise UserError(f"{what}: {name} is all zero")


def count_parameters(model: torch.nn.Module, shape: ModelShape | None = None) -> int:
    """Number of parameters; shared ones once.

    Args:
        model: of either kind.
        shape: of a Megatron-Core model: rows of the padded vocabulary are left out.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    if shape is None:
        return count
    tables = 2 if shape.untie_embeddings_and_output_weights else 1
    return count - tables * (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size
