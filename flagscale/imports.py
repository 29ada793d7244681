"""Large libraries imported at less cost.

`without` leaves out what they take along where it is there, and we never use; `uncollected` keeps
the garbage collector from looking through what they make.
"""

from __future__ import annotations

import gc
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


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside.

    What an import makes stays. The collector looks through all of it again whenever it has grown by
    a quarter: a fifth of the time that torch and what belongs to it take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
