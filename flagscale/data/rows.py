"""Rows, where in them a document is, and those that cannot be used.

A bad row is named and left out; too many of them end the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from flagscale.errors import UserError

logger = logging.getLogger(__name__)

_SHARE, _LEAST = 0.001, 10  # what is left out where the recipe names no number
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


class Row(NamedTuple):
    """A row as it was read.

    Attributes:
        where: file and row, for messages.
        values: by field; `BadRow` where there is no reading it.
    """

    where: str
    values: dict[str, Any] | BadRow


def field_alone(field: str, names: Iterable[str]) -> list[str]:
    """`Column.columns` of what stands in one field."""
    return [field] if field in names else []


class Column(NamedTuple):
    """Where in a row its document is.

    Attributes:
        field: key or column.
        option: of the recipe, which names the field.
        read: makes text of a row's values, given the field, and the place for messages.
        columns: those of a row's keys that are read for a field; none where it is not there.
    """

    field: str
    option: str
    read: Callable[[Mapping[str, Any], str, str], str]
    columns: Callable[[str, Iterable[str]], list[str]] = field_alone

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of a row's keys that are read; none where no document is among them."""
        return self.columns(self.field, names)

    def text(self, row: Row) -> str:
        """The document of a row.

        Raises:
            BadRow: there is none.
        """
        if isinstance(row.values, BadRow):
            raise row.values
        if not self.among(row.values):
            raise BadRow(row.where, self.missing(row.values))
        return self.read(row.values, self.field, row.where)

    def missing(self, names: Any) -> str:  # noqa: ANN401 - any iterable of names
        """What is said where the field is not among `names`."""
        there = ", ".join(map(str, names))
        return f"no field {self.field!r}; there are: {there}. Set data.{self.option}"


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

    def add(self, row: BadRow, encoding: bool = False) -> None:
        """Count one, and name it in the log.

        Args:
            row: what is wrong.
            encoding: it was read, and its document could not be encoded.

        Raises:
            UserError: they are more than allowed; names the first ten.
        """
        self.count += 1
        kept = self._encoded if encoding else self._read
        if len(kept) < _KEPT:
            kept.append(row)
        limit = self._limit
        if limit is None:
            limit = max(_LEAST, int(_SHARE * self.rows))
        if self.count > limit:
            raise UserError(self.told(f"more than {limit} (data.max_bad_rows)"))
        logger.warning("left out: %s", row)

    def told(self, why: str) -> str:
        """An error's text with the first ten."""
        first = "".join(f"\n  {row}" for row in self._first(_TOLD))
        return f"{self.count} of {self.rows} rows so far cannot be used, {why}; the first:{first}"

    def facts(self) -> dict[str, Any]:
        """For the manifest: the number, and the first hundred; what could not be read first."""
        return {"bad_rows": self.count, "first_bad_rows": list(map(str, self._first(_KEPT)))}

    def _first(self, number: int) -> list[BadRow]:
        return [*self._read, *self._encoded][:number]
