"""Large libraries imported at less cost.

`without` leaves out what they take along where it is there, and we never use; `uncollected` keeps
the garbage collector from looking through what they make; `compile_when_called` leaves torch's
compiler alone until something is called that it compiles.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any


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


def compile_when_called() -> None:
    """Let functions be compiled when they are called, not as their libraries are imported.

    In Megatron-Core and transformers `torch.compile` and `torch.compiler.disable` are decorators of
    functions that are seldom called, and load torch's compiler, which takes as long as torch
    itself. What is called is compiled as it would have been.
    """
    if not any(isinstance(finder, _Late) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Late())


class _Late(MetaPathFinder):
    """Finds these libraries where Python would, and has them imported with other decorators."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "megatron.core" and not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_late(module: ModuleType) -> None:
            if fullname == "megatron.core":
                import torch  # noqa: F401 - as it does itself, further on
            with _late_decorators():
                load(module)

        spec.loader.exec_module = load_late  # type: ignore[method-assign]
        return spec


@contextmanager
def _late_decorators() -> Iterator[None]:
    """Inside, torch's decorators wait for the first call; without torch nothing happens."""
    torch = sys.modules.get("torch")
    compile_now = getattr(torch, "compile", None)
    if torch is None or compile_now is None or hasattr(compile_now, "is_late"):
        yield
        return
    disable_now = torch.compiler.disable

    def compile_late(function: Any = None, **options: Any) -> Any:  # noqa: ANN401 - as torch's own
        if function is None:
            return functools.partial(compile_late, **options)
        if not isinstance(function, FunctionType):
            return compile_now(function, **options)
        return compiled_at_first_call(function, functools.partial(compile_now, **options))

    def disable_late(
        function: Any = None,  # noqa: ANN401 - as torch's own
        recursive: bool = True,
        *,
        reason: str | None = None,
    ) -> Any:  # noqa: ANN401
        return torch._disable_dynamo(function, recursive)  # how torch leaves its own ones out

    compile_late.is_late = True  # type: ignore[attr-defined]
    torch.compile, torch.compiler.disable = compile_late, disable_late
    try:
        yield
    finally:
        torch.compile, torch.compiler.disable = compile_now, disable_now


def compiled_at_first_call(
    function: Callable[..., Any], compile_now: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """A function that is compiled when it is first called.

    Args:
        function: the plain one.
        compile_now: `torch.compile`, with its options.
    """
    import torch

    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the function takes
        nonlocal compiled
        if torch.compiler.is_compiling():  # one that calls this one, which becomes part of it
            return function(*args, **kwargs)
        if compiled is None:
            compiled = compile_now(function)
        return compiled(*args, **kwargs)

    return call
