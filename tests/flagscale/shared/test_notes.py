"""What a step leaves for its next attempt."""

from pathlib import Path

import pytest

from flagscale.shared import notes
from flagscale.shared.notes import Note


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "_PAUSE_SECONDS", 0)


@pytest.mark.parametrize("where", ["volume", "bucket", "here"])
def test_the_next_attempt_finds_it(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "here":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    else:
        place = tmp_path if where == "volume" else request.getfixturevalue("bucket")
        monkeypatch.setenv("FLAGSCALE_SHARED", str(place))
    first = Note("scores", {"of": 1})
    assert first.read() == {}
    first.write({"a": [1.5, 2]})
    first.write({"a": [1.5, 2], "b": [3, 4]})
    assert Note("scores", {"of": 1}).read() == {"a": [1.5, 2], "b": [3, 4]}
    assert Note("scores", {"of": 2}).read() == {}
    first.remove()
    first.remove()
    assert Note("scores", {"of": 1}).read() == {}


def test_what_comes_at_once_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path))
    monkeypatch.setattr(notes, "_PAUSE_SECONDS", 1e6)
    note = Note("scores", {})
    note.write({"a": 1})
    assert note.read() == {}


def test_a_writer_that_was_killed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path))
    note = Note("scores", {})
    note.write({"a": [1.5, 2]})
    (file,) = (tmp_path / "notes").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert Note("scores", {}).read() == {}
    assert "cannot be read, and is made anew" in caplog.text


def test_where_nothing_can_be_written_that_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "notes").write_text("no folder")
    monkeypatch.setenv("FLAGSCALE_SHARED", str(tmp_path))
    note = Note("scores", {})
    note.write({"a": 1})
    note.write({"a": 2})
    assert caplog.text.count("cannot be written") == 1
