import gc
import importlib.util
import sys

import pytest

from flagscale.imports import uncollected, without


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
