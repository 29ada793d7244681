"""What the component says of a field that there is not."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import evaluate_tasks


def test_a_field_that_there_is_not_is_named(tmp_path: Path) -> None:
    given = arguments(evaluate_tasks, tmp_path) | {"tasks_recipe": {"num_fewshots": 1}}
    assert "did you mean 'num_fewshot'" in error_of(evaluate_tasks, given, tmp_path)
