"""Markdown as the UI of Kubeflow Pipelines, GitHub and MLflow show it: text that stays text."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_|~#]|\](?=[(\[]))")  # the last: of a link


def escaped(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would take for its own."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", plain)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column is text, the others are figures.

    Args:
        columns: their titles.
        rows: a cell a column.
    """
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[escaped(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
