"""Rows that cannot be used: each is named and left out, and too many of them end the step."""

from __future__ import annotations

import logging
from typing import Any

from flagscale.errors import UserError

logger = logging.getLogger(__name__)

SHARE = 0.001  # of the rows, where the recipe names no number
LEAST = 10
_TOLD = 10  # in the error
_KEPT = 100  # in the manifest


class BadRow(UserError):  # noqa: N818 - a row, which travels as a value too
    """One row, or the conversation in it, cannot be used; the others can.

    Args:
        where: file and row, or whatever else leads to it (`Document.origin`).
        reason: what is wrong and what would be right, without the place.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


class BadRows:
    """Those of a corpus so far; for one thread.

    Args:
        limit: `data.max_bad_rows`; None: 0.1% of the rows so far and at least 10.

    Attributes:
        rows: rows so far, these among them.
        count: bad ones so far.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.rows = self.count = 0
        self._limit = limit
        # Apart, for encoding runs behind reading by a distance that depends on the threads.
        self._read: list[BadRow] = []
        self._encoded: list[BadRow] = []

    def add(self, error: BadRow, encoding: bool = False) -> None:
        """Count one, and name it in the log.

        Args:
            error: what was wrong.
            encoding: the row was read, and its document could not be encoded.

        Raises:
            UserError: they are more than allowed; names the first ten.
        """
        self.count += 1
        kept = self._encoded if encoding else self._read
        if len(kept) < _KEPT:
            kept.append(error)
        limit = self._limit
        if limit is None:
            limit = max(LEAST, int(SHARE * self.rows))
        if self.count > limit:
            raise UserError(self.told(f"more than {limit} (data.max_bad_rows)"))
        logger.warning("left out: %s", error)

    def told(self, why: str) -> str:
        """An error's text with the first ten."""
        first = "".join(f"\n  {error}" for error in self.first[:_TOLD])
        return f"{self.count} of {self.rows} rows so far cannot be used, {why}; the first:{first}"

    @property
    def first(self) -> list[BadRow]:
        """The first hundred: those that could not be read, then those not encoded."""
        return [*self._read, *self._encoded][:_KEPT]

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"bad_rows": self.count, "first_bad_rows": [str(error) for error in self.first]}
