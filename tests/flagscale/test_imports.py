import gc
import importlib.util
import sys
from typing import Any

import pytest
import torch

from flagscale.imports import compiled_at_first_call, uncollected, without


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
