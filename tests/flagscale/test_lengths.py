"""What a reader is promised of every file of the library."""

from pathlib import Path

import flagscale

MOST_LINES = 300


def test_no_file_is_long() -> None:
    files = list(Path(flagscale.__path__[0]).rglob("*.py"))
    assert len(files) > 100
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: n for path, n in lines.items() if n > MOST_LINES} == {}
