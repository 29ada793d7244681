"""Measures a process' imports: Python runs this first in processes that find it on `PYTHONPATH`.

Where `IMPORT_TIMES` names a folder, a file there tells afterwards what the process imported. Times
are the whole process' CPU time, so that other work on the machine counts little.
"""

import atexit
import json
import os
import sys
import time
from importlib.machinery import ExtensionFileLoader, SourceFileLoader

_running: list[float] = []  # CPU seconds that the modules now loading have spent on others
_own: dict[str, float] = {}  # top-level package -> CPU seconds in its own files
_total = {"cpu": 0.0, "wall": 0.0}


def _timed(kind: type, method: str) -> None:
    load = getattr(kind, method)

    def timed(loader: object, what: object) -> object:  # a module, or its specification
        cpu, wall = time.process_time(), time.monotonic()
        _running.append(0.0)
        try:
            return load(loader, what)
        finally:
            spent = time.process_time() - cpu
            package = getattr(loader, "name", "?").partition(".")[0]
            _own[package] = _own.get(package, 0.0) + spent - _running.pop()
            if _running:
                _running[-1] += spent
            else:
                _total["cpu"] += spent
                _total["wall"] += time.monotonic() - wall

    setattr(kind, method, timed)


def _note(folder: str) -> None:
    found = {"argv": sys.argv, **_total, "own": _own, "modules": sorted(sys.modules)}
    with open(os.path.join(folder, f"{os.getpid()}.json"), "w", encoding="utf-8") as stream:
        json.dump(found, stream)


if "IMPORT_TIMES" in os.environ:
    _timed(SourceFileLoader, "exec_module")
    _timed(ExtensionFileLoader, "create_module")
    _timed(ExtensionFileLoader, "exec_module")
    atexit.register(_note, os.environ["IMPORT_TIMES"])
