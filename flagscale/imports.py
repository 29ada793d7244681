"""Large libraries imported at less cost.

`without` leaves out what they take along where it is there, and we never use; `late` puts off what
they cannot do without; `uncollected` keeps the garbage collector from looking through what they
make.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
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
def late(names: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Inside, `from module import name` gives what loads the module when it is first called.

    For functions and classes that a library imports and seldom calls. The first call puts the real
    ones in the places of all that are late where it is made, so that an exception among them is the
    real one before it is looked for. Not for blocks in which other threads import.

    Args:
        names: of modules -> of what is late in them; of one that is loaded already nothing is.
    """
    put_off = {module: _LateModule(module, of) for module, of in names.items()}
    put_off = {name: module for name, module in put_off.items() if name not in sys.modules}
    sys.modules.update(put_off)
    try:
        yield
    finally:
        for name, module in put_off.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _LateModule(ModuleType):
    """Stands for a module that is not loaded; anything but its late names loads it."""

    def __init__(self, name: str, late_names: Sequence[str]) -> None:
        super().__init__(name)
        self._late = {one: _Late(one, (), {"_of": (name, one)}) for one in late_names}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the module has
        if name.startswith("__"):
            raise AttributeError(name)
        return self._late[name] if name in self._late else _real(self.__name__, name)


class _Late(type):
    """A class or function of a module that is not loaded; the call of one loads it."""

    _of: tuple[str, str]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        used_in = sys._getframe(1).f_globals
        for name, value in list(used_in.items()):
            if isinstance(value, _Late):
                used_in[name] = _real(*value._of)
        return _real(*cls._of)(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        """As of the real one, of which there is no instance before its module is loaded."""
        module, name = cls._of
        loaded = sys.modules.get(module)
        if loaded is None or isinstance(loaded, _LateModule):
            return False
        return isinstance(instance, getattr(loaded, name))


def _real(module: str, name: str) -> Any:  # noqa: ANN401 - whatever it is
    if isinstance(sys.modules.get(module), _LateModule):
        del sys.modules[module]
    return getattr(importlib.import_module(module), name)


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
    """Let what Megatron-Core compiles be compiled when it is called, not as it is imported.

    Its `jit_fuser`, which is `torch.compile`, decorates functions that are seldom called, and loads
    torch's compiler, which takes as long as torch itself. What is called is compiled as before.
    """
    if not any(isinstance(finder, _LateFuser) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LateFuser())


class _LateFuser(MetaPathFinder):
    """Finds `megatron.core.jit` where Python would, and puts off what its decorator does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "megatron.core.jit":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_late(module: ModuleType) -> None:
            load(module)
            module.jit_fuser = functools.partial(  # type: ignore[attr-defined]
                compiled_at_first_call, compile_now=module.jit_fuser
            )

        spec.loader.exec_module = load_late  # type: ignore[method-assign]
        return spec


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
