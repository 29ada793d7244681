"""Proofs that a model is transformers' model: its layers and logits on a fixed text, its weights.

What a right copy may differ by depends on what it computes in. In float32 only the order of sums
differs: six digits agree. In bfloat16 a layer rounds what it adds by about a percent, and over
the layers that moves logits by as much as a mistake in one layer would. So every layer is compared
by itself, on the same input. A mistake in one (rows in another order, another layer's weights,
another rotary base) changes what it adds by a tenth to more than all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from flagscale.errors import UserError
from flagscale.models.layer_outputs import Outputs

FIXED_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969, two people walked on the Moon; a third "
    "stayed in orbit. `def area(radius): return 3.14159 * radius ** 2` computes the area of a "
    "circle. Water boils at 100 degrees Celsius (212 degrees Fahrenheit) at sea level, and an "
    "encyclopaedia is a book, or a set of books, that has facts on many subjects."
)

# In 16 bits. Right copies of SmolLM2-135M: 0.013 without allowance for storing, 0.0013, 100%.
_MAX_LAYER_DIFFERENCE = 0.05
_TIMES_ROUNDING = 3
_MAX_KL_DIVERGENCE = 0.02
_MIN_TOP1_AGREEMENT = 0.9


@dataclass(frozen=True)
class Parity:
    """How far a model's logits are from transformers' own.

    Attributes:
        max_logit_difference: largest |difference| of any logit.
        mean_logit_difference: mean |difference|.
        logit_spread: standard deviation of transformers' logits over the vocabulary, mean over
            positions: what a difference is to be seen against.
        kl_divergence: forward, from transformers to the model, nats a token.
        top1_agreement: share of positions where both predict the same token.
        num_tokens: positions compared.
        dtype: that the model computed in; transformers computes in float32.
    """

    max_logit_difference: float
    mean_logit_difference: float
    logit_spread: float
    kl_divergence: float
    top1_agreement: float
    num_tokens: int
    dtype: torch.dtype

    def figures(self) -> dict[str, float]:
        """All of it that goes into a manifest and to MLflow."""
        names = ("max_logit_difference", "mean_logit_difference", "logit_spread")
        return {name: getattr(self, name) for name in (*names, "kl_divergence", "top1_agreement")}


def fixed_tokens(tokenizer: PreTrainedTokenizerFast, seq_length: int) -> torch.Tensor:
    """The fixed text as tokens, int64 [1, s] with s at most `seq_length`."""
    ids = tokenizer(FIXED_TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids[:seq_length]], dtype=torch.int64)


def compare_logits(
    ours_bsv: torch.Tensor, theirs_bsv: torch.Tensor, dtype: torch.dtype = torch.float32
) -> Parity:
    """Compare logits, float32 [b, s, vocabulary], of the same tokens.

    Args:
        ours_bsv: of the model in question.
        theirs_bsv: of transformers.
        dtype: that ours were computed in.

    Raises:
        ValueError: the shapes differ.
    """
    if ours_bsv.shape != theirs_bsv.shape:
        raise ValueError(f"logits of shapes {ours_bsv.shape} and {theirs_bsv.shape}")
    ours_bsv, theirs_bsv = ours_bsv.cpu(), theirs_bsv.cpu()
    difference = (ours_bsv - theirs_bsv).abs()
    agree = ours_bsv.argmax(-1) == theirs_bsv.argmax(-1)
    positions = zip(ours_bsv.flatten(0, 1), theirs_bsv.flatten(0, 1), strict=True)
    divergences = [_kl_divergence(theirs_v, ours_v) for ours_v, theirs_v in positions]
    return Parity(
        max_logit_difference=difference.max().item(),
        mean_logit_difference=difference.mean().item(),
        logit_spread=theirs_bsv.std(-1).mean().item(),
        kl_divergence=sum(divergences) / len(divergences),
        top1_agreement=agree.float().mean().item(),
        num_tokens=agree.numel(),
        dtype=dtype,
    )


def layer_differences(
    ours: Outputs, theirs: Outputs, dtype: torch.dtype, made: Sequence[torch.Tensor] = ()
) -> list[float]:
    """How far each part is from transformers', as a share of what the part adds to its input.

    The median over positions: the first ones of many models have a few states a thousand times as
    large as all others. What storing a state in 16 bits may cost is no difference; it is told for
    every state by itself, since in the rounding of the largest all others would disappear.

    Args:
        ours: from `layer_outputs`.
        theirs: from `in_transformers`, made with ours.
        dtype: that ours were computed in.
        made: what is compared with theirs; default: ours.

    Returns:
        Of the embedding, every layer, and the output layer with its norm.
    """
    made = made or [*ours.hidden_bsh, ours.logits_bsv]
    last = len(made) - 1
    differences = []
    for number, (our, their) in enumerate(zip(made, theirs.hidden_bsh, strict=True)):
        before = torch.zeros_like(their)
        # Half of it when attention's output is added, half of it when the MLP's is.
        stored = torch.finfo(dtype).eps * their.abs()
        if 0 < number < last:
            before = ours.hidden_bsh[number - 1]
        elif number == last:  # logits mean the same whatever is added to all
            our, their = (logits - logits.mean(-1, keepdim=True) for logits in (our, their))
        distance = ((our - their).abs() - stored).clamp_min(0).norm(dim=-1)
        added = (their - before).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        differences.append((distance / added).median().item())
    return differences


def check_layers(
    differences: list[float],
    dtype: torch.dtype,
    limit: float,
    where: str,
    rounding: Sequence[float] = (),
) -> None:
    """Refuse a model of which a part is not transformers'.

    Args:
        differences: from `layer_differences`.
        dtype: that the model computed in.
        limit: in float32; in 16 bits it is 0.05, or three times what rounding does to transformers'
            own layer where that is more.
        where: the recipe's field that holds the limit.
        rounding: `layer_differences` of transformers' own layers in `dtype`.

    Raises:
        UserError: naming the part that differs most.
    """
    limits = [limit] * len(differences)
    if dtype != torch.float32:
        where = f"the limit of {dtype}"
        limits = [
            max(_MAX_LAYER_DIFFERENCE, _TIMES_ROUNDING * own)
            for own in rounding or [0.0] * len(differences)
        ]
    shares = [
        _or_infinite(difference) / limit
        for difference, limit in zip(differences, limits, strict=True)
    ]
    worst = max(range(len(shares)), key=shares.__getitem__)
    last = len(differences) - 1
    name = {0: "the embedding", last: "the output layer"}.get(worst, f"layer {worst - 1}")
    if not shares[worst] <= 1:
        raise UserError(
            f"{where}={limits[worst]:g}: {name} differs from transformers' by "
            f"{differences[worst]:.3g} of what it adds"
        )


def check_logits(parity: Parity, limit: float, where: str) -> None:
    """Refuse logits that are further from transformers' than rounding explains, or not numbers.

    Args:
        parity: what was measured.
        limit: in float32, largest |difference| as a share of the logits' spread. In 16 bits it is
            a KL divergence of at most 0.02 nats and the same top token at 90% of the positions.
        where: the recipe's field that holds the limit.

    Raises:
        UserError: naming the difference and the limit.
    """
    if parity.dtype == torch.float32:
        is_same = parity.max_logit_difference <= limit * parity.logit_spread  # NaN is not
    else:
        is_same = (
            parity.kl_divergence <= _MAX_KL_DIVERGENCE
            and parity.top1_agreement >= _MIN_TOP1_AGREEMENT
        )
        limit, where = _MAX_KL_DIVERGENCE, f"KL divergence in {parity.dtype}"
    if not is_same:
        raise UserError(
            f"{where}={limit:g}: the logits differ by {parity.max_logit_difference:.3g} from "
            f"transformers' (mean {parity.mean_logit_difference:.3g}, of a spread of "
            f"{parity.logit_spread:.3g}; a KL divergence of {parity.kl_divergence:.3g} nats a "
            f"token, the same top token at {parity.top1_agreement:.1%} of {parity.num_tokens} "
            "positions)"
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


def _kl_divergence(theirs_v: torch.Tensor, ours_v: torch.Tensor) -> float:
    """At one position, in float64: in float32 the rounding of a wide vocabulary's sum shows."""
    theirs_log, ours_log = (one.double().log_softmax(-1) for one in (theirs_v, ours_v))
    return (theirs_log.exp() * (theirs_log - ours_log)).sum().item()


def _or_infinite(value: float) -> float:
    return value if value == value else float("inf")  # NaN is neither large nor small
