"""Checkpoints in an object store: the folder's content there and back, faults, kills."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mirrored_pod import Pod

from flagscale.errors import UserError
from flagscale.shared.store import ObjectStore
from flagscale.train.checkpoints import mirror
from flagscale.train.checkpoints.folders import STATE

KILLED = Path(__file__).with_name("mirrored_pod.py")


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/checkpoints/training"


def test_another_pod_finds_latest_and_best(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = Pod(url, tmp_path / "a")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 4.0), (5, 2.0)):
        first.save(step, loss)
    assert f"checkpoint of step 5: in {url} " in caplog.text
    second = Pod(url, tmp_path / "b")
    assert second.content() == first.content()
    latest, best = second.folders.latest(), second.folders.best()
    assert latest
    assert best
    assert (latest.step, best.step) == (5, 2)
    store = ObjectStore(url)
    assert [name[:13] for name in store.folders()] == [f"step-0000000{n}" for n in (2, 4, 5)]
    assert list(first.folder.glob(".upload-*")) == []


def test_nothing_there_is_a_beginning(url: str, tmp_path: Path) -> None:
    (tmp_path / "a" / "step-00000007").mkdir(parents=True)  # of a training that was forgotten
    pod = Pod(url, tmp_path / "a")
    assert pod.folders.latest() is None
    assert pod.content() == {}


def test_going_on_uploads_only_what_is_new(url: str, tmp_path: Path) -> None:
    Pod(url, tmp_path / "a").save(1)
    before = ObjectStore(url).folders()
    pod = Pod(url, tmp_path / "b")
    pod.save(2)
    assert set(before) < set(ObjectStore(url).folders())
    pod.save(3)
    assert not set(before) & set(ObjectStore(url).folders())


def test_what_was_cut_off_does_not_count_and_goes(url: str, tmp_path: Path) -> None:
    """A pod was killed after it had uploaded a file of step 2."""
    Pod(url, tmp_path / "a").save(1)
    ObjectStore(url).write("step-00000002-12345678/history.json", b"{}")
    pod = Pod(url, tmp_path / "b")
    latest = pod.folders.latest()
    assert latest
    assert latest.step == 1
    pod.save(2)
    assert "step-00000002-12345678" not in ObjectStore(url).folders()


def test_one_that_comes_back_late_deletes_nothing_of_its_successor(
    url: str, tmp_path: Path
) -> None:
    late = Pod(url, tmp_path / "a", keep=1)
    late.save(1)
    successor = Pod(url, tmp_path / "b")
    successor.save(2)
    late.save(3)  # before it looks at its lease again
    successor.save(4, loss=2.0)  # two are kept, the second is the best
    third = Pod(url, tmp_path / "c")
    assert third.content() == successor.content()
    assert "step-00000002/state/0.distcp" in third.content()


def test_training_does_not_wait_and_the_newest_counts(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are deleted here long before they could be uploaded."""
    put, trained, in_time = ObjectStore.put, threading.Event(), []

    def slowly(self: ObjectStore, files: dict[str, Path]) -> None:
        in_time.append(trained.wait(300))
        put(self, files)

    monkeypatch.setattr(ObjectStore, "put", slowly)
    pod = Pod(url, tmp_path / "a", keep=1)
    for step in range(1, 21):
        pod.save(step, 1 / step, wait=False)
    trained.set()
    pod.wait()
    assert all(in_time), "training waited for an upload"
    assert len(in_time) < 5, "each was uploaded"
    found = Pod(url, tmp_path / "b")
    assert found.content() == pod.content()
    assert len(found.content()) == 3
    assert list(pod.folder.glob(".upload-*")) == []


def test_a_store_that_fails_leaves_training_alone(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pod = Pod(url, tmp_path / "a")
    pod.save(1)
    put, faults = ObjectStore.put, iter([True, True])

    def failing(self: ObjectStore, files: dict[str, Path]) -> None:
        if next(faults, False):
            raise UserError("the store is out of order")
        put(self, files)

    monkeypatch.setattr(ObjectStore, "put", failing)
    pod.save(2)
    assert "step 2: was not uploaded: the store is out of order; training goes on" in caplog.text
    latest = Pod(url, tmp_path / "b").folders.latest()
    assert latest
    assert latest.step == 1
    pod.save(3)
    pod.save(4)  # succeeds, for all that are kept
    assert Pod(url, tmp_path / "c").content() == pod.content()


def test_what_is_damaged_there_is_refused(url: str, tmp_path: Path) -> None:
    Pod(url, tmp_path / "a").save(1)
    store = ObjectStore(url)
    (name,) = [n for n in store.sizes() if n.endswith("0.distcp")]
    store.write(name, b"short")
    with pytest.raises(UserError, match=r"0.distcp: 5 bytes, but 12000 were written"):
        Pod(url, tmp_path / "b")
    store.remove(name)
    with pytest.raises(UserError, match=r"0.distcp: is missing"):
        Pod(url, tmp_path / "c")
    for text in (b"{", b"[]", json.dumps({"format_version": 2}).encode()):
        store.write("latest.json", text)
        with pytest.raises(UserError, match=r"latest.json: cannot be read"):
            Pod(url, tmp_path / "d")


def test_place_and_forget(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert mirror.place(str(tmp_path / "x"), "name") == (tmp_path / "x" / "name", None)
    folder, remote = mirror.place(f"{bucket}/checkpoints/", "name")
    assert folder.parent == tmp_path
    assert remote
    Pod(f"{bucket}/checkpoints/name", folder).save(1)
    ObjectStore(bucket).write("checkpoints/other/latest.json", b"{}")
    mirror.forget(f"{bucket}/checkpoints", "name")
    assert not folder.exists()
    assert list(ObjectStore(bucket).sizes()) == ["checkpoints/other/latest.json"]
    mirror.forget(f"{bucket}/checkpoints", "name")  # nothing there: told, not raised


@pytest.mark.parametrize("here", ["gone", "stuck"])
def test_what_is_forgotten_leaves_the_store_whatever_is_here(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    def stuck(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ObjectStore(bucket).write("checkpoints/name/latest.json", b"{}")
    folder, _ = mirror.place(f"{bucket}/checkpoints", "name")
    if here == "stuck":
        folder.mkdir()
        monkeypatch.setattr(mirror.shutil, "rmtree", stuck)
    mirror.forget(f"{bucket}/checkpoints", "name")
    assert ObjectStore(bucket).sizes() == {}


def test_killed_at_a_random_moment_the_store_has_a_whole_checkpoint(
    url: str, tmp_path: Path, torchrun: Callable[..., object]
) -> None:
    """A process saves one checkpoint after another, until it is killed; its disk is lost."""
    urls = [f"{url}-{number}" for number in range(3)]
    torchrun(1, KILLED, tmp_path, *urls)
    for number, one in enumerate(urls):
        pod = Pod(one, tmp_path / f"next-{number}")
        latest = pod.folders.latest()
        assert latest
        told = (tmp_path / f"told-{number}").read_text()
        assert latest.step >= int(told or 0)
        found = (latest.path / STATE / "0.distcp").read_text()
        assert found == f"weights of {latest.step}" * 1000
