"""Where in the text a student disagrees with its teacher, and how sure models are of themselves.

What there is to be told; `flagscale.evaluation.report.token_analysis` finds it. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class TokenTable:
    """All predicted tokens, document after document; each array [n].

    Attributes:
        document_n: index of its document.
        position_n: tokens that the model had seen in the window, at least 1.
        label_n: the token of the text.
        teacher_entropy_n: nats.
        teacher_confidence_n: the largest probability that the teacher gives.
        teacher_guess_n: the token that it gives it to.
        kl_n: student -> nats.
        confidence_n: student -> the largest probability.
        guess_n: student -> the token.
    """

    document_n: np.ndarray
    position_n: np.ndarray
    label_n: np.ndarray
    teacher_entropy_n: np.ndarray
    teacher_confidence_n: np.ndarray
    teacher_guess_n: np.ndarray
    kl_n: Mapping[str, np.ndarray]
    confidence_n: Mapping[str, np.ndarray]
    guess_n: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Slice:
    """Tokens that have something in common.

    Attributes:
        label: what.
        tokens: how many.
        kl: student -> value, low, high, nats a token; low and high are None where all of the tokens
            are of one document.
    """

    label: str
    tokens: int
    kl: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Calibration:
    """Whether a model is right as often as it says.

    Attributes:
        tokens: how many have their most probable token's probability in each of
            `CALIBRATION_BINS` equal bins.
        confidence: the mean of these probabilities, a bin; 0 in an empty one.
        accuracy: how often that token is the text's; ditto.
        ece: expected calibration error (Guo et al., 2017): the mean over tokens of the absolute
            difference of a bin's two. Biased upwards where there are few tokens, and so without an
            interval.
        overconfidence: mean probability less accuracy over all tokens: value, low, high.
    """

    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    ece: float
    overconfidence: dict[str, float]


@dataclass(frozen=True)
class WorstToken:
    """A token where the distilled student is far from its teacher.

    Attributes:
        document: its number, from 1.
        position: of the token in the document.
        before: the text before it.
        token: of the text.
        teacher: what the teacher would say, and its probability.
        student: what the student would say, and its probability.
        kl: nats, of this token.
    """

    document: int
    position: int
    before: str
    token: str
    teacher: tuple[str, float]
    student: tuple[str, float]
    kl: float


@dataclass(frozen=True)
class WorstDocument:
    """A document where it is far from its teacher throughout.

    Attributes:
        document: its number, from 1.
        tokens: how many were predicted.
        kl: student -> nats a token.
        begins: its first words.
    """

    document: int
    tokens: int
    kl: dict[str, float]
    begins: str


@dataclass(frozen=True)
class TokenFindings:
    """What a report says of single tokens.

    Attributes:
        slices: `position`, `teacher entropy`, `token frequency` -> the tokens, cut by it.
        calibration: of each model.
        worst_tokens: the largest KL after distillation first.
        worst_documents: ditto, a token on average.
    """

    slices: dict[str, tuple[Slice, ...]]
    calibration: dict[str, Calibration]
    worst_tokens: tuple[WorstToken, ...]
    worst_documents: tuple[WorstDocument, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `of_json`."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> TokenFindings:
        """The inverse of `as_json`, also once it went through JSON."""
        calibration = {
            model: Calibration(
                tuple(one["tokens"]),
                tuple(one["confidence"]),
                tuple(one["accuracy"]),
                one["ece"],
                one["overconfidence"],
            )
            for model, one in values["calibration"].items()
        }
        tokens = [
            WorstToken(**{**t, "teacher": tuple(t["teacher"]), "student": tuple(t["student"])})
            for t in values["worst_tokens"]
        ]
        return cls(
            slices={
                name: tuple(Slice(**one) for one in found)
                for name, found in values["slices"].items()
            },
            calibration=calibration,
            worst_tokens=tuple(tokens),
            worst_documents=tuple(WorstDocument(**one) for one in values["worst_documents"]),
        )
