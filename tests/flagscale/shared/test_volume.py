import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kfp import dsl

from flagscale.artifacts import MANIFEST, Manifest, new_artifact, open_artifact
from flagscale.errors import UserError
from flagscale.execution.notes import FOLDER_VARIABLE, read_error
from flagscale.execution.step_process import step_process, when_published
from flagscale.shared import damage, fetch, read_pointer, shared_place
from flagscale.shared.volume import Volume

HERE = Path(__file__).parent


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "volume"
    folder.mkdir()
    monkeypatch.setenv("FLAGSCALE_SHARED", str(folder))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return folder


def write(output: Path, text: str = "weights") -> Manifest:
    with new_artifact(output, "student", {}) as staging:
        (staging.path / "weights").mkdir()
        (staging.path / "weights" / "0").write_text(text)
    assert staging.manifest
    return staging.manifest


def publish(path: Path, text: str = "weights") -> Path:
    """A step that makes an artifact; gives its folder on the volume."""
    with step_process("convert-student") as step:
        write(step.output(dsl.Model(uri=str(path)).path), text)
    pointer = read_pointer(path)
    assert pointer
    return Path(pointer.location)


def test_an_artifact_goes_to_the_volume_and_a_pointer_to_kfp(shared: Path, tmp_path: Path) -> None:
    folder = publish(tmp_path / "pod-a" / "model")
    assert folder.parent == shared / "artifacts"
    assert [path.name for path in (tmp_path / "pod-a" / "model").iterdir()] == ["pointer.json"]
    with step_process("distil-student") as step:
        found = step.input("student", dsl.Model(uri=str(tmp_path / "pod-a" / "model")))
        manifest = open_artifact(found, "student")
    assert found == folder
    pointer = json.loads((tmp_path / "pod-a" / "model" / "pointer.json").read_text())
    assert pointer["digest"] == manifest.digest
    assert folder.name == f"student-{manifest.digest.removeprefix('sha256:')[:16]}"
    assert pointer["bytes"] == 7 + (folder / MANIFEST).stat().st_size
    assert list(shared.glob("artifacts/.*")) == []


def test_without_a_shared_place_paths_stay_what_they_are(tmp_path: Path) -> None:
    assert shared_place() is None
    with step_process("convert-student") as step:
        assert step.output(str(tmp_path / "out")) == tmp_path / "out"
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "weights").touch()
        assert step.input("student", dsl.Model(uri=str(tmp_path / "in"))) == tmp_path / "in"


def test_equal_content_is_kept_once_and_a_damaged_one_does_not_count(
    shared: Path, tmp_path: Path
) -> None:
    folder = publish(tmp_path / "a")
    before = folder.stat().st_ino
    assert publish(tmp_path / "b") == folder
    assert folder.stat().st_ino == before
    (folder / "weights" / "0").write_text("damaged")
    another = publish(tmp_path / "c")
    assert another.name == f"{folder.name}-2"
    open_artifact(another, "student")
    assert publish(tmp_path / "d") == another
    assert sorted(os.listdir(shared / "artifacts")) == [folder.name, another.name]


def test_several_that_publish_the_same_at_once(shared: Path, tmp_path: Path) -> None:
    barrier = threading.Barrier(6)

    def one(_: int) -> Path:
        with Volume(shared) as volume:
            staged = volume.stage("convert-student")
            write(staged)
            barrier.wait()
            return fetch(volume.publish(staged), tmp_path)

    for _ in range(5):
        with ThreadPoolExecutor(6) as pool:
            (found,) = set(pool.map(one, range(6)))
        open_artifact(found, "student")
        assert list(shared.glob("artifacts/.*")) == []
        (found / "weights" / "0").write_text("damaged")


@pytest.mark.parametrize("what", ["files", "manifest", "nothing", "manifest missing"])
def test_what_changed_on_the_volume_is_refused(shared: Path, tmp_path: Path, what: str) -> None:
    folder = publish(tmp_path / "model")
    if what == "files":
        with (folder / "weights" / "0").open("r+b") as stream:
            stream.write(b"W")  # one bit of one byte
        expected = "weights/0 is missing or changed"
    elif what == "manifest":
        values = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(values | {"facts": {"loss": 0.0}}))
        expected = "is not the student that was written there"
    elif what == "nothing":
        shutil.rmtree(shared / "artifacts")
        expected = f"nothing is left at {folder}: mount the volume"
    else:
        (folder / MANIFEST).unlink()
        expected = "manifest.json is missing"
    with pytest.raises(SystemExit), step_process("distil-student") as step:
        open_artifact(step.input("student", dsl.Model(uri=str(tmp_path / "model"))), "student")
    message = str(read_error(tmp_path))
    assert expected in message
    assert message.startswith("input student: ") == (what != "files")
    assert ("another where_code_version" in message) == (what in ("manifest", "nothing"))
    pointer = read_pointer(tmp_path / "model")
    assert pointer
    assert expected in str(damage(pointer))


def test_pointers_of_another_version_or_none_are_refused(tmp_path: Path) -> None:
    assert read_pointer(tmp_path) is None
    for text, expected in (("{", "not a pointer"), ("{}", "version None"), ("[]", "version None")):
        (tmp_path / "pointer.json").write_text(text)
        with pytest.raises(UserError, match=expected):
            read_pointer(tmp_path)
    (tmp_path / "pointer.json").write_text('{"format_version": 1, "kind": "student"}')
    with pytest.raises(UserError, match="not a pointer"):
        read_pointer(tmp_path)


def test_a_pointer_is_no_artifact(shared: Path, tmp_path: Path) -> None:
    publish(tmp_path / "model")
    with pytest.raises(UserError, match="no student here"):
        open_artifact(tmp_path / "model", "student")


def test_a_volume_that_is_not_mounted_is_not_made_up(shared: Path, tmp_path: Path) -> None:
    shared.rmdir()
    with pytest.raises(SystemExit), step_process("convert-student") as step:
        step.output(str(tmp_path / "model"))
    assert "is the volume mounted" in str(read_error(tmp_path))


def test_a_step_that_writes_nothing_fails(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit), step_process("convert-student") as step:
        step.output(str(tmp_path / "model"))
    assert "without writing its artifact" in str(read_error(tmp_path))
    assert not (tmp_path / "model").exists()
    assert list((shared / "artifacts").iterdir()) == []


def test_a_step_that_fails_publishes_nothing(shared: Path, tmp_path: Path) -> None:
    done: list[str] = []

    def failing_step() -> None:
        with step_process("convert-student") as step:
            when_published(lambda: done.append("too early"))
            write(step.output(str(tmp_path / "model")))
            raise UserError("after the artifact")

    with pytest.raises(SystemExit):
        failing_step()
    assert not (tmp_path / "model").exists()
    assert list((shared / "artifacts").iterdir()) == []
    assert done == []


def test_what_waits_for_publication_is_done_after_it(shared: Path, tmp_path: Path) -> None:
    found: list[bool] = []
    with step_process("convert-student") as step:
        when_published(lambda: found.append(read_pointer(tmp_path / "model") is not None))
        write(step.output(str(tmp_path / "model")))
    when_published(lambda: found.append(True))
    assert found == [True, True]


def test_folders_of_dead_steps_go_and_those_of_living_ones_stay(
    shared: Path, tmp_path: Path
) -> None:
    artifacts = shared / "artifacts"
    for name, age in ((".a-1", 4000), (".b-2", 3000)):
        (artifacts / name).mkdir(parents=True)
        (artifacts / name / "alive").touch()
        then = (artifacts / name / "alive").stat().st_mtime - age
        os.utime(artifacts / name / "alive", (then, then))
    (artifacts / ".c-3").mkdir()  # killed before it could say that it lives
    os.utime(artifacts / ".c-3", (0, 0))
    folder = publish(tmp_path / "model")
    assert sorted(os.listdir(artifacts)) == [".b-2", folder.name]


def test_a_running_step_says_that_it_lives(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flagscale.shared.volume._ALIVE_SECONDS", 0.05)
    with Volume(shared) as volume:
        alive = volume.stage("distil-student").with_name("alive")
        os.utime(alive, (0, 0))
        for _ in range(200):
            if alive.stat().st_mtime > 0:
                break
            threading.Event().wait(0.01)
        assert alive.stat().st_mtime > 0


def test_killed_at_any_point_a_step_can_be_run_again(shared: Path, tmp_path: Path) -> None:
    command = [sys.executable, HERE / "publish_worker.py", shared, tmp_path / "work"]
    (tmp_path / "work").mkdir()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    *killed, whole, again = json.loads((tmp_path / "work" / "result.json").read_text())
    assert whole[0] == 0
    assert whole[1].startswith("sha256:")
    assert again == whole
    assert len(killed) >= 6
    assert [code for code, _ in killed] == [-9] * len(killed)
    assert {found for _, found in killed} <= {"", whole[1]}
