"""What the cache hands out when artifacts lie on a volume: it looks behind the pointers."""

from pathlib import Path

import pytest

from flagscale.artifacts import new_artifact
from flagscale.execution.step_process import step_process
from flagscale.shared import read_pointer
from pipelines.local.step_cache import _damage


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
