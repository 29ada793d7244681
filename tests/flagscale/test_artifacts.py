import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

from flagscale.artifacts import (
    MANIFEST,
    Manifest,
    digest,
    hash_files,
    is_disk_full,
    new_artifact,
    open_artifact,
)
from flagscale.errors import UserError


def begin(output: Path, error: Exception) -> None:
    with new_artifact(output, "dataset", {}) as staging:
        (staging.path / "half").write_text("half")
        raise error


def write(output: Path, text: str = "one", parents: dict[str, Manifest] | None = None) -> Manifest:
    with new_artifact(output, "dataset", {"data": {"source": "x"}}, parents) as staging:
        (staging.path / "sub").mkdir()
        (staging.path / "sub" / "file").write_text(text)
        staging.facts["documents"] = 3
        staging.tokenizer_hash = "sha256:0"
    assert staging.manifest
    return staging.manifest


def test_what_is_written_is_what_is_opened(tmp_path: Path) -> None:
    written = write(tmp_path / "a")
    assert open_artifact(tmp_path / "a", "dataset") == written
    assert written.facts == {"documents": 3}
    assert written.recipe == {"data": {"source": "x"}}
    assert list(written.files) == ["sub/file"]
    assert written.libraries["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_digest_tells_content_and_origin_apart(tmp_path: Path) -> None:
    one, same = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", "two")
    child, cousin = (write(tmp_path / "d", parents={"dataset": p}) for p in (one, other))
    assert one.digest == same.digest
    assert len({one.digest, other.digest, child.digest, cousin.digest}) == 4
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_the_most_memory_held_is_told_and_no_part_of_the_identity(tmp_path: Path) -> None:
    one = write(tmp_path / "a")
    assert 2**20 < one.peak_memory["host"][0] < 2**40
    other = replace(one, peak_memory={"host": [1, 2], "device": [3, 4]})
    assert other.digest == one.digest


def test_an_error_leaves_nothing_and_keeps_what_stood_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="oops"):
        begin(tmp_path / "new", ValueError("oops"))
    assert not list(tmp_path.iterdir())

    written = write(tmp_path / "old")
    with pytest.raises(KeyError):
        begin(tmp_path / "old", KeyError())
    assert open_artifact(tmp_path / "old", "dataset") == written


def test_a_new_artifact_replaces_the_old_one_wholly(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with new_artifact(tmp_path / "a", "student", {}) as staging:
        (staging.path / "other").write_text("x")
    assert list(open_artifact(tmp_path / "a", "student").files) == ["other"]
    assert not (tmp_path / "a" / "sub").exists()


def test_what_a_killed_step_left_is_no_artifact_and_no_obstacle(tmp_path: Path) -> None:
    partial = tmp_path / ".a.partial"
    partial.mkdir()
    (partial / "stale").write_text("x")
    with pytest.raises(UserError, match="no dataset here"):
        open_artifact(tmp_path / "a", "dataset")
    assert list(write(tmp_path / "a").files) == ["sub/file"]


@pytest.mark.parametrize("change", ["edit", "remove", "add"])
def test_a_changed_file_is_refused_by_name(tmp_path: Path, change: str) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "sub" / "file"
    if change == "edit":
        file.write_text("eno")
    elif change == "remove":
        file.unlink()
    else:
        file = tmp_path / "a" / "sub" / "more"
        file.write_text("x")
    with pytest.raises(UserError, match=f"sub/{file.name} is missing or changed"):
        open_artifact(tmp_path / "a", "dataset")


def test_another_kind_or_version_or_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(UserError, match="is a 'dataset', but a 'teacher' is needed"):
        open_artifact(tmp_path / "a", "teacher")
    manifest = tmp_path / "a" / MANIFEST
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        open_artifact(tmp_path / "a", "dataset")
    for text in ("{", "[]", '{"kind": "dataset"}'):
        manifest.write_text(text)
        with pytest.raises(UserError, match="not a manifest"):
            open_artifact(tmp_path / "a", "dataset")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no space left on the disk of .* \(\d+ MiB free\)"):
        begin(tmp_path / "a", OSError(errno.ENOSPC, "No space left on device"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_seen_through_other_errors() -> None:
    def raised() -> Exception:
        try:
            try:
                raise OSError(errno.EDQUOT, "quota")
            except OSError as error:
                raise RuntimeError("save failed") from error
        except RuntimeError as error:
            return error

    assert is_disk_full(raised())
    assert not is_disk_full(OSError(errno.EACCES, "no"))


def test_hashes_leave_out_the_manifest_alone(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / MANIFEST).write_text("{}")
    assert list(hash_files(tmp_path)) == [f"sub/{MANIFEST}"]
