"""What the component says of a figure that decides nothing."""

from pathlib import Path

from components.testing import arguments, error_of

from ..component import leaderboard


def test_a_figure_that_there_is_not_is_refused(tmp_path: Path) -> None:
    given = arguments(leaderboard, tmp_path) | {"metric": "speed"}
    assert "metric='speed': must be one of" in error_of(leaderboard, given, tmp_path)
