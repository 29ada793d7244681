"""The checks of a cluster: each with its outcome, its time and what was seen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from flagscale.errors import UserError
from pipelines.outcome import duration

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"


class Failed(Exception):  # noqa: N818 - an outcome
    """The cluster does not do what it should."""


class Skipped(Exception):  # noqa: N818 - an outcome
    """What the check needs is not here."""


@dataclass(frozen=True)
class Row:
    """One check."""

    name: str
    outcome: str
    seconds: float
    seen: str

    def line(self) -> str:
        """One line of the table."""
        return f"{self.name:<44} {self.outcome:<8} {duration(self.seconds):>12}  {self.seen}"


@dataclass
class Table:
    """All checks, told as they end and once more at the end."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def check(self, name: str, work: Callable[[], str], began: float | None = None) -> bool:
        """Do a check; what goes wrong in it is its outcome.

        Args:
            name: of the check.
            work: gives what was seen, or raises.
            began: when what it looks at did; None: now.

        Returns:
            Whether it passed.
        """
        began = time.monotonic() if began is None else began
        try:
            outcome, seen = PASS, work()
        except Skipped as reason:
            outcome, seen = SKIPPED, str(reason)
        except (Failed, UserError) as error:
            outcome, seen = FAIL, str(error)
        except Exception as error:  # one check that breaks leaves the others alone
            outcome, seen = FAIL, f"{type(error).__name__}: {error}"
        row = Row(name, outcome, time.monotonic() - began, " ".join(seen.split())[:400])
        self.rows.append(row)
        self.tell(row.line())
        return outcome == PASS

    def tell(self, text: str) -> None:
        """A line, at once."""
        self.out.write(f"{text}\n")
        self.out.flush()

    def end(self) -> int:
        """Print the table; the exit code is 1 where a check failed."""
        counts = {o: sum(r.outcome == o for r in self.rows) for o in (PASS, FAIL, SKIPPED)}
        head = f"{'check':<44} {'outcome':<8} {'time':>12}  seen"
        self.tell("\n".join(["", head, "-" * len(head), *(row.line() for row in self.rows), ""]))
        taken = duration(time.monotonic() - self.began)
        told = f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIPPED]} skipped"
        self.tell(f"{told}, {taken}")
        return 1 if counts[FAIL] or not counts[PASS] else 0
