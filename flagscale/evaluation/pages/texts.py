"""Values as pages show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of name and text."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{name}: ")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            rows += flat({str(i): item for i, item in enumerate(value, 1)}, f"{name} ")
        elif isinstance(value, list | tuple):
            rows.append((name, ", ".join(_text(item) for item in value) or "none"))
        else:
            rows.append((name, _text(value)))
    return rows


def _text(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def count(parameters: int) -> str:
    """`135M`, `1.2B`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)
