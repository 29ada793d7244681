"""What a reader is promised of every file, and pytest of every test module."""

from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = {
    "flagscale": 300,
    "components": 400,
    "pipelines": 400,
    "benchmarks": 400,
    "tests": 400,
}


@pytest.mark.parametrize(("folder", "most"), MOST_LINES.items(), ids=MOST_LINES)
def test_no_file_is_long(folder: str, most: int) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert len(files) > 10
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: n for path, n in lines.items() if n > most} == {}


def test_no_two_test_modules_share_a_name() -> None:
    """Pytest knows them by it alone, unless they are in a package."""
    places = defaultdict(list)
    for folder in ("tests", "components"):
        for path in (ROOT / folder).rglob("test_*.py"):
            if not path.with_name("__init__.py").exists():
                places[path.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 100
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
