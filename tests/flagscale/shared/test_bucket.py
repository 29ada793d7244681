import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kfp import dsl

from flagscale.artifacts import MANIFEST, Manifest, new_artifact, open_artifact
from flagscale.errors import UserError
from flagscale.execution.notes import FOLDER_VARIABLE, read_error
from flagscale.execution.step_process import step_process
from flagscale.shared import damage, fetch, read_pointer
from flagscale.shared.store import ObjectStore

HERE = Path(__file__).parent
FILES = {"weights/0": b"w" * 3_000_000, "weights/empty": b"", "model.json": b"{}"}


@pytest.fixture
def shared(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FLAGSCALE_SHARED", f"{bucket}/distillation/")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    return f"{bucket}/distillation"


def write(output: Path) -> Manifest:
    with new_artifact(output, "student", {}) as staging:
        for name, content in FILES.items():
            (staging.path / name).parent.mkdir(exist_ok=True)
            (staging.path / name).write_bytes(content)
    assert staging.manifest
    return staging.manifest


def publish(path: Path) -> ObjectStore:
    with step_process("convert-student") as step:
        write(step.output(str(path)))
    pointer = read_pointer(path)
    assert pointer
    return ObjectStore(pointer.location)


def test_an_artifact_goes_to_the_bucket_and_comes_back(shared: str, tmp_path: Path) -> None:
    store = publish(tmp_path / "model")
    assert store.url.startswith(f"{shared}/artifacts/student-")
    assert set(store.sizes()) == {*FILES, MANIFEST}
    with step_process("distil-student") as step:
        folder = step.input("student", dsl.Model(uri=str(tmp_path / "model")))
        open_artifact(folder, "student")
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert list((tmp_path / "tmp").iterdir()) == []  # nothing of either step is left
    pointer = read_pointer(tmp_path / "model")
    assert pointer
    assert damage(pointer) is None


def test_what_changed_in_the_bucket_is_refused(shared: str, tmp_path: Path) -> None:
    store = publish(tmp_path / "model")
    pointer = read_pointer(tmp_path / "model")
    assert pointer

    def refused() -> str:
        with pytest.raises(SystemExit), step_process("distil-student") as step:
            open_artifact(step.input("student", dsl.Model(uri=str(tmp_path / "model"))), "student")
        return str(read_error(tmp_path))

    store.write("weights/0", b"v" * 3_000_000)  # the size is the same
    assert "weights/0 is missing or changed" in refused()
    store.write("weights/0", b"w")
    assert "weights/0 is missing or changed" in refused()
    assert "bytes, but" in str(damage(pointer))
    store.remove("weights/0")
    assert f"{store.url}/weights/0: is missing" in refused()
    assert "weights/0: is missing" in str(damage(pointer))
    values = json.loads(store.read(MANIFEST) or b"")
    store.write(MANIFEST, json.dumps(values | {"facts": {"loss": 0}}).encode())
    assert "is not the student that was written there" in refused()
    store.remove(MANIFEST)
    assert "look whether this is the bucket" in refused()
    assert "look whether this is the bucket" in str(damage(pointer))
    publish(tmp_path / "again")  # heals it
    assert damage(pointer) is None


def test_errors_of_the_store_say_where(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/a: cannot be written: .*bucket"):
        ObjectStore("s3://no-such-bucket").write("a", b"")
    with pytest.raises(UserError, match="known are s3://, gs:// and az://"):
        ObjectStore("what://bucket").read("a")
    with pytest.raises(UserError, match="b/c: is missing"):
        ObjectStore(f"{bucket}/b").get({"c": tmp_path / "c"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"cannot be read: .*127\.0\.0\.1:9"):
        ObjectStore(bucket).read("a")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_that_cannot_be_written_is_refused_before_the_work(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGSCALE_SHARED", "s3://no-such-bucket/distillation")

    def step_of_hours() -> None:
        with step_process("prepare-data") as step:
            step.output(str(tmp_path / "dataset"))
            pytest.fail("the work has begun")

    with pytest.raises(SystemExit):
        step_of_hours()
    assert "s3://no-such-bucket/distillation/artifacts" in str(read_error(tmp_path))
    assert "cannot be written" in str(read_error(tmp_path))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_upload_that_arrives_short_is_noticed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(bucket)
    (tmp_path / "file").write_bytes(b"12345")
    arrived = store.sizes

    def somebody_else_wrote() -> dict[str, int]:
        ObjectStore(bucket).write("file", b"123")
        return arrived()

    monkeypatch.setattr(store, "sizes", somebody_else_wrote)
    with pytest.raises(UserError, match="file: 3 bytes have arrived of 5"):
        store.put({"file": tmp_path / "file"})


def test_killed_at_any_upload_a_step_can_be_run_again(shared: str, tmp_path: Path) -> None:
    """Readers see no artifact, or a whole one."""
    (tmp_path / "work").mkdir()
    command = [sys.executable, HERE / "publish_worker.py", shared, tmp_path / "work"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    *killed, whole, again = json.loads((tmp_path / "work" / "result.json").read_text())
    assert killed == [[-9, ""]] * 3  # two files and the manifest
    assert whole[0] == 0
    assert whole[1].startswith("sha256:")
    assert again == whole


def test_a_place_that_is_lost_on_the_way_leaves_no_pointer(shared: str, tmp_path: Path) -> None:
    def step_without_bucket() -> None:
        with step_process("convert-student") as step:
            write(step.output(str(tmp_path / "model")))
            ObjectStore(shared.rsplit("/", 1)[0]).remove()  # the bucket itself

    with pytest.raises(SystemExit):
        step_without_bucket()
    assert "cannot be written" in str(read_error(tmp_path))
    assert not (tmp_path / "model").exists()


def test_fetched_files_are_those_of_the_manifest(shared: str, tmp_path: Path) -> None:
    store = publish(tmp_path / "model")
    store.write("left-by-somebody", b"")
    pointer = read_pointer(tmp_path / "model")
    assert pointer
    open_artifact(fetch(pointer, tmp_path / "copy"), "student")
    shutil.rmtree(tmp_path / "copy")
