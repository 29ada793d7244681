import gc
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from flagscale.imports import compiled_at_first_call, late, uncollected, without


def test_a_loaded_package_is_hidden_and_comes_back() -> None:
    import yaml

    with without("yaml", "not_there_at_all"):
        assert importlib.util.find_spec("yaml") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("yaml")
    assert importlib.import_module("yaml") is yaml
    assert "not_there_at_all" not in sys.modules


def test_one_that_is_not_loaded_can_be_imported_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with pytest.raises(ValueError, match="failed"), without("this"):  # noqa: PT012
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("this")
        raise ValueError("failed")
    assert importlib.util.find_spec("this") is not None


@pytest.mark.parametrize("before", [True, False])
def test_nothing_is_collected_inside_and_afterwards_as_before(before: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == before
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_a_function_is_compiled_once_when_it_is_called_and_is_part_of_one_that_calls_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # flagscale.megatron.platform's
    graphs: list[Any] = []

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=backend, fullgraph=True)

    def half(x: torch.Tensor, *, by: float = 2.0) -> torch.Tensor:
        """Divide."""
        return x / by

    inner = compiled_at_first_call(half, compiled)
    outer = compiled_at_first_call(lambda x: inner(x, by=4.0) + 1, compiled)
    assert (inner.__name__, inner.__doc__, graphs) == ("half", "Divide.", [])
    x = torch.arange(4.0)
    assert torch.equal(outer(x), x / 4 + 1)
    assert len(graphs) == 1  # with the inner one in it: `fullgraph` takes no break
    assert torch.equal(inner(x), x / 2)
    assert torch.equal(inner(x), x / 2)
    assert len(graphs) == 2


LATE = {"colorsys": ("rgb_to_hls", "hls_to_rgb"), "sched": ("scheduler",)}


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that imports what is late."""
    for name in LATE:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = ModuleType("user")
    with late(LATE):
        code = "from colorsys import hls_to_rgb, rgb_to_hls\nfrom sched import scheduler"
        exec(code, vars(module))
    return module


def test_what_is_late_is_loaded_by_the_first_call_and_all_of_it_is_real(user: ModuleType) -> None:
    assert not set(LATE) & set(sys.modules)
    exec("found = rgb_to_hls(0.2, 0.4, 0.4)", vars(user))
    colorsys = importlib.import_module("colorsys")
    assert user.found == colorsys.rgb_to_hls(0.2, 0.4, 0.4)
    assert (user.rgb_to_hls, user.hls_to_rgb) == (colorsys.rgb_to_hls, colorsys.hls_to_rgb)
    assert user.scheduler is importlib.import_module("sched").scheduler


def test_nothing_is_of_a_late_class_before_its_module_is_loaded(user: ModuleType) -> None:
    assert not isinstance(1, user.scheduler)
    real = importlib.import_module("sched").scheduler()
    assert isinstance(real, user.scheduler)
    assert not isinstance(1, user.scheduler)


def test_what_was_not_asked_to_be_late_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with late({"colorsys": ("rgb_to_hls",)}):
        from colorsys import ONE_THIRD
    assert ONE_THIRD == 1 / 3


def test_a_loaded_module_is_not_late() -> None:
    colorsys = importlib.import_module("colorsys")
    with late(LATE):
        assert importlib.import_module("colorsys") is colorsys
