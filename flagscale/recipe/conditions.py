"""The language of a gate's conditions: sums of figures, compared with their confidence intervals.

    condition := sum comparison sum ["at" number "%"]
    comparison := ">=" | "<=" | ">" | "<"
    sum := ["-"] term (("+" | "-") term)*
    term := number ["*" figure] | figure
    figure := model "/" name, e.g. `distilled/kl` or `teacher/arc_easy:acc_norm`

A figure's name ends at a blank or one of `* < > =`, so that `+` and `-` beside one need blanks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_TOKEN = re.compile(
    r"\s*(?:(?P<figure>[A-Za-z_][\w.-]*/[^\s*<>=]+)"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<compare>>=|<=|>|<)"
    r"|(?P<sign>[*+%-])"
    r"|(?P<word>[A-Za-z]+))"
)
_SHAPE = "must read like 'distilled/accuracy >= 0.97 * teacher/accuracy at 95%'"
_LARGEST = 1e30  # as everywhere in a recipe


@dataclass(frozen=True)
class Condition:
    """`sum(factor * figure) + constant >= 0`, for the whole of an interval.

    Attributes:
        text: as the recipe has it.
        factors: figure (`distilled/kl`) -> what it is multiplied by; none of them is 0.
        constant: what is added.
        strict: whether 0 itself is too little.
        confidence: mass of the interval; None: that of the evaluation.
    """

    text: str
    factors: Mapping[str, float]
    constant: float
    strict: bool
    confidence: float | None


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Args:
        text: in the language above.

    Raises:
        ValueError: where it leaves the language, or what it says nothing about.
    """
    return _Parser(text).condition()


class _Parser:
    """Reads one token after the other."""

    def __init__(self, text: str) -> None:
        self._text, self._tokens = text, _tokens(text)
        self._at = 0

    def condition(self) -> Condition:
        left, left_constant = self._sum()
        comparison = self._take("compare")
        if comparison is None:
            raise self._wrong("a comparison: >=, <=, > or <")
        right, right_constant = self._sum()
        confidence = self._confidence()
        if self._at < len(self._tokens):
            raise self._wrong("the end, or 'at 95%'")
        sign = 1.0 if comparison.startswith(">") else -1.0
        factors = {
            figure: sign * (left.get(figure, 0.0) - right.get(figure, 0.0))
            for figure in (*left, *(name for name in right if name not in left))
        }
        factors = {figure: factor for figure, factor in factors.items() if factor}
        if not factors:
            raise ValueError(f"says nothing about any figure; {_SHAPE}")
        constant = sign * (left_constant - right_constant)
        strict = comparison in (">", "<")
        return Condition(self._text, factors, constant, strict, confidence)

    def _sum(self) -> tuple[dict[str, float], float]:
        factors: dict[str, float] = {}
        constant = 0.0
        sign = -1.0 if self._take("sign", "-") else 1.0
        while True:
            factor, figure = self._term()
            if figure is None:
                constant += sign * factor
            else:
                factors[figure] = factors.get(figure, 0.0) + sign * factor
            operator = self._take("sign", "+", "-")
            if operator is None:
                return factors, constant
            sign = -1.0 if operator == "-" else 1.0

    def _term(self) -> tuple[float, str | None]:
        figure = self._take("figure")
        if figure is not None:
            return 1.0, figure
        number = self._number("a figure like distilled/kl, or a number")
        if not self._take("sign", "*"):
            return number, None
        figure = self._take("figure")
        if figure is None:
            raise self._wrong("a figure like distilled/kl")
        return number, figure

    def _confidence(self) -> float | None:
        if self._take("word", "at") is None:
            return None
        percent = self._number("a number of percent")
        if self._take("sign", "%") is None:
            raise self._wrong("%")
        if not 0 < percent < 100:
            raise ValueError(f"at {percent:g}%: must be more than 0% and less than 100%")
        return percent / 100

    def _number(self, wanted: str) -> float:
        text = self._take("number")
        if text is None:
            raise self._wrong(wanted)
        number = float(text)
        if not math.isfinite(number) or number > _LARGEST:
            raise ValueError(f"{text}: must be no more than {_LARGEST:g}")
        return number

    def _take(self, kind: str, *texts: str) -> str | None:
        """The next token if it is of this kind, and one of these if any are named."""
        if self._at == len(self._tokens):
            return None
        found, text = self._tokens[self._at]
        if found != kind or (texts and text not in texts):
            return None
        self._at += 1
        return text

    def _wrong(self, wanted: str) -> ValueError:
        rest = self._tokens[self._at :]
        found = f"{rest[0][1]!r} stands" if rest else "it ends"
        return ValueError(f"{found} where {wanted} should be; {_SHAPE}")


def _tokens(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    place = 0
    end = len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"{text[place:].strip()!r} is no part of a condition; {_SHAPE}")
        assert match.lastgroup is not None
        found.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    return found
