"""Which sources are GGUF files. Their own file, so that to ask needs no transformers."""

from __future__ import annotations

from pathlib import Path

PACKAGE_PREFIX = "package:"


def is_gguf(source: str | Path) -> bool:
    """Whether the source is a GGUF file, of which even the configuration is slow to read."""
    return str(source).endswith(".gguf") or str(source).startswith(PACKAGE_PREFIX)
