"""Whether a teacher helps, by "Distillation Scaling Laws" (Busbridge et al., arXiv 2502.08606).

The law was fitted to students of 143M to 12.6B parameters that began with random weights, on C4 and
with pure distillation at temperature 1, up to 512B tokens. It says what it says of such students;
one that begins with its teacher's layers, as most here do, is far ahead of it at first. What it
tells is the shape: a teacher helps most where tokens are few, text alone catches up in the end, and
a teacher may be too good for its student.

Losses are cross-entropies in nats a token of their vocabulary; parameters are those without the
embedding.
"""

from __future__ import annotations

import math

# Supervised, equation 1: E + (A / N^alpha + B / D^beta)^gamma
_E, _A, _B = 1.220, 3355.0, 18186.0
_ALPHA, _BETA, _GAMMA = 0.408, 0.431, 0.452
# Distillation, equation 8.
_A_D, _B_D = 2243.0, 24181.0
_ALPHA_D, _BETA_D, _GAMMA_D = 0.321, 0.637, 0.764
_C0, _C1, _D1, _F1 = 2.549, 522.61, 1.315, 0.090
MOST_TOKENS = 512e9  # of a student that it was fitted to
_FARTHEST = 1e15  # tokens


def text_alone(parameters: float, tokens: float) -> float:
    """Cross-entropy of a model that was trained on text.

    Args:
        parameters: without the embedding.
        tokens: that it was trained on.
    """
    return _E + (_A / parameters**_ALPHA + _B / tokens**_BETA) ** _GAMMA


def distilled(parameters: float, tokens: float, teacher: float) -> float:
    """Cross-entropy of a student.

    Args:
        parameters: of the student, without the embedding.
        tokens: that it was distilled on.
        teacher: the teacher's cross-entropy, as `text_alone` gives it.
    """
    ability = teacher / (text_alone(parameters, tokens) * _D1)
    # (1 + ability^(1/f1))^(-c1 f1), by logarithms: the first power may be huge.
    gap = -_C1 * _F1 * math.log1p(ability ** (1 / _F1))
    own = (_A_D / parameters**_ALPHA_D + _B_D / tokens**_BETA_D) ** _GAMMA_D
    return teacher + teacher**-_C0 * math.exp(gap) * own


def overtaken(parameters: float, teacher: float) -> float:
    """Tokens from which on text alone gives the better student, at most 10^15: infinite beyond.

    Args:
        parameters: of the student, without the embedding.
        teacher: the teacher's cross-entropy, as `text_alone` gives it.
    """
    low, high = 0.0, math.log(_FARTHEST)
    if _ahead(parameters, math.exp(high), teacher):
        return math.inf
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _ahead(parameters, math.exp(middle), teacher) else (low, middle)
        )
    return math.exp(high)


def _ahead(parameters: float, tokens: float, teacher: float) -> bool:
    return distilled(parameters, tokens, teacher) < text_alone(parameters, tokens)
