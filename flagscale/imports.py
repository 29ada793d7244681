"""Imports of large libraries without what they take along where it is there, and we never use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Inside, packages pass for not installed: `import` fails and `find_spec` finds nothing.

    For libraries that work with and without a package, and look for it when they are imported. Not
    for blocks in which other threads import.

    Args:
        packages: top-level names; one that is loaded already is there again afterwards.
    """
    loaded = {name: sys.modules[name] for name in packages if name in sys.modules}
    # Python's own mark of a module that must not be imported.
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(loaded)
