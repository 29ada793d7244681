"""Checks the times of a schedule as KFP reads them: six fields, seconds first.

KFP uses robfig/cron, which takes five fields too and then reads them one place to the left: what
means two o'clock elsewhere runs every hour there. Five are refused here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flagscale.errors import UserError

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


@dataclass(frozen=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def number(self, text: str) -> int | None:
        if text.lower() in self.names:
            return self.names.index(text.lower()) + self.low
        if text.isascii() and text.isdigit() and self.low <= int(text) <= self.high:
            return int(text)
        return None


_FIELDS = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 6, _DAYS),
)
_PART = re.compile(r"(\*|\?|(?P<first>\w+)(-(?P<last>\w+))?)(/(?P<step>\d+))?")


def check_cron(text: str) -> str:
    """The expression, single spaces between its fields.

    Args:
        text: e.g. `0 0 2 * * *`, each day at 02:00 of the server's clock (UTC, most often).

    Raises:
        UserError: not six fields, or one of them is out of range.
    """
    parts = text.split()
    if len(parts) == 5:
        raise UserError(
            f"cron {text!r}: has five fields, KFP's have six with the seconds first; "
            f"write '0 {' '.join(parts)}'"
        )
    if len(parts) != len(_FIELDS):
        raise UserError(
            f"cron {text!r}: must have six fields ({', '.join(f.name for f in _FIELDS)}), "
            "e.g. '0 0 2 * * *' for each day at 02:00"
        )
    for field, part in zip(_FIELDS, parts, strict=True):
        for item in part.split(","):
            _check(text, field, item)
    return " ".join(parts)


def _check(text: str, field: _Field, item: str) -> None:
    found = _PART.fullmatch(item)
    right = f"{field.low} to {field.high}"
    if field.names:
        right += f", {field.names[0].upper()} to {field.names[-1].upper()}"
    wrong = UserError(f"cron {text!r}: {field.name} {item!r} must be {right}, *, or a-b, a,b, */n")
    if found is None or found["step"] == "0":
        raise wrong
    given = [bound for bound in (found["first"], found["last"]) if bound]
    bounds = [number for bound in given if (number := field.number(bound)) is not None]
    if len(bounds) != len(given) or bounds != sorted(bounds):
        raise wrong
