"""Writes what was measured into docs/sizes.md, where `make sizes` asks for it (RENEW_TABLE)."""

import os
from collections.abc import Iterable
from pathlib import Path

from pipelines.sizes_document import renewed

DOCUMENT = Path(__file__).parents[3] / "docs" / "sizes.md"


def renew(name: str, rows: Iterable[tuple[str, int, int]]) -> None:
    """Replace a table.

    Args:
        name: of the place in the document.
        rows: what, bytes measured, bytes estimated.
    """
    if not os.environ.get("RENEW_TABLE"):
        return
    lines = ["| | measured, MB | estimated, MB | difference |", "|---|---:|---:|---:|"]
    for what, measured, estimated in rows:
        difference = f"{estimated / measured - 1:+.1%}"
        lines.append(f"| {what} | {measured / 1e6:.1f} | {estimated / 1e6:.1f} | {difference} |")
    DOCUMENT.write_text(renewed(DOCUMENT.read_text(), name, lines))
