"""What the cache hands out when artifacts lie on a volume: it looks behind the pointers."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from flagscale.artifacts import new_artifact
from flagscale.execution.step_process import step_process
from flagscale.shared import read_pointer
from pipelines.local.step_cache import StepCache, _damage


def test_a_pointer_is_as_good_as_what_it_points_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path / "volume"))
    path = tmp_path / "run" / "model"
    with (
        step_process("convert-student") as step,
        new_artifact(step.output(str(path)), "student", {}) as staging,
    ):
        (staging.path / "weights").write_text("weights")
    assert _damage(path) is None
    pointer = read_pointer(path)
    assert pointer
    weights = Path(pointer.location) / "weights"
    weights.write_text("Weights")
    assert "weights is missing or changed" in str(_damage(path))
    weights.write_text("weights")
    assert _damage(path) is None
    (path / "pointer.json").write_text("{}")
    assert "format version None" in str(_damage(path))


class Untidy:
    """An observer that cannot note what has ended."""

    def started(self, name: str) -> None:
        raise AssertionError

    def reused(self, name: str, outputs: Mapping[str, Path]) -> None:
        raise AssertionError

    def finished(self, name: str, outputs: Mapping[str, Path], gave_values: bool) -> None:
        raise OSError(f"no room for {name}")


def test_what_could_not_be_noted_ends_the_run(tmp_path: Path) -> None:
    """KFP logs what is raised here, and would run the next step."""
    cache = StepCache(str(tmp_path), Untidy(), reuse=True)
    key = cache.compute_key("comp-train", "image", [], {}, {})
    with pytest.raises(OSError, match="no room for train"):
        cache.put(key, {})
    with pytest.raises(OSError, match="no room for train"):
        cache.get(key)
    with pytest.raises(OSError, match="no room for train"):
        cache.check()
