"""What the component says of a field that there is not, and how it ends."""

from pathlib import Path

import pytest

from components.testing import arguments
from flagscale.execution.absent import absent, reason
from flagscale.execution.notes import FOLDER_VARIABLE

from ..component import measure_layers


def test_a_failure_is_told_to_the_students_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    changes = {"students": [{"num_layer": 1}], "record_failure": True}
    given = arguments(measure_layers, tmp_path) | changes
    measure_layers.python_func(**given)
    manifest = absent(tmp_path / "layer_importance-out")
    assert manifest
    assert "did you mean 'num_layers'" in reason(manifest)
