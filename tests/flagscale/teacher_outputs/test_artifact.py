"""Writing, being killed, going on, reading, and what is damaged."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from kfp import dsl

from flagscale.artifacts import new_artifact
from flagscale.errors import UserError
from flagscale.execution.notes import FOLDER_VARIABLE
from flagscale.execution.step_process import step_process
from flagscale.shared import read_pointer
from flagscale.shared.store import ObjectStore
from flagscale.teacher_outputs import KIND, Hidden, OutputsWriter, SparseTargets, TeacherOutputs
from flagscale.teacher_outputs.shards import ENTRY, ShardWriter
from tests.flagscale.teacher_outputs.outputs import CODECS, S, answers, encoded, facts, make

RECORDS, INDEX = "train/00000-00000.records", "train/00000-00000.index"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an artifact with four samples of train and one of validation."""
    make(tmp_path / "outputs", facts(), {"train": [7, 0, 3, 5], "validation": [1]})
    return tmp_path / "outputs"


@pytest.mark.parametrize("codec", CODECS)
def test_samples_are_read_in_any_order(tmp_path: Path, codec: str) -> None:
    of = facts(codec)
    reader = make(tmp_path / "outputs", of, {"train": [7, 0, 3], "validation": [1]})
    assert reader.facts == of
    read = reader.read("train", [3, 7, 3])
    expected = reader.codec.decode(encoded(of, "train", [3, 7, 3]))
    assert isinstance(read, Hidden | SparseTargets)
    for name, value in vars(expected).items():
        assert value is None or torch.equal(getattr(read, name), value)
    assert reader.missing("train", [5, 0, 1, 3]) == [5, 1]
    assert reader.missing("test", [0]) == [0]
    assert reader.manifest_facts["samples"] == {
        "train": {"stored": 3, "of": 9},
        "validation": {"stored": 1, "of": 2},
    }
    size = sum(
        p.stat().st_size for p in (tmp_path / "outputs").rglob("*") if p.parent.name != "outputs"
    )
    assert reader.manifest_facts["bytes_per_token"] == size / (4 * S)


def test_a_sample_that_is_not_there_is_named(folder: Path) -> None:
    reader = TeacherOutputs.open(folder)
    with pytest.raises(UserError, match=r"no answer to sample 4 of train, only to 4.*samples: all"):
        reader.read("train", [0, 4])
    with pytest.raises(UserError, match="no answer to sample 0 of test, only to 0 others"):
        reader.read("test", [0])


def test_a_flipped_bit_of_a_record_is_found_by_those_who_read_it(folder: Path) -> None:
    content = bytearray((folder / RECORDS).read_bytes())
    size = len(content) // 4
    content[size + 1] ^= 4
    (folder / RECORDS).write_bytes(content)
    reader = TeacherOutputs.open(folder)
    reader.read("train", [7, 3, 5])
    with pytest.raises(UserError, match=rf"sample 0 of train \({RECORDS}, {size} bytes at {size}"):
        reader.read("train", [3, 0])


def test_a_record_in_anothers_place_is_found(folder: Path) -> None:
    content = (folder / RECORDS).read_bytes()
    size = len(content) // 4
    (folder / RECORDS).write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    with pytest.raises(UserError, match=r"sample 7 of train .* is damaged"):
        TeacherOutputs.open(folder).read("train", [7])


def test_a_truncated_shard_is_found_by_those_who_read_the_end(folder: Path) -> None:
    os.truncate(folder / RECORDS, (folder / RECORDS).stat().st_size - 1)
    reader = TeacherOutputs.open(folder)
    reader.read("train", [7, 0, 3])
    with pytest.raises(UserError, match=r"sample 5 of train .* is damaged"):
        reader.read("train", [5])


@pytest.mark.parametrize("name", [INDEX, "facts.json", RECORDS])
def test_a_file_that_is_gone_or_changed_is_found_when_it_is_opened(folder: Path, name: str) -> None:
    if name == INDEX:
        content = bytearray((folder / name).read_bytes())
        content[1] ^= 1
        (folder / name).write_bytes(content)
    else:
        (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing or changed; make the teacher-outputs"):
        TeacherOutputs.open(folder)


def test_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="version 2, this program reads 1; make them anew"):
        make(tmp_path / "outputs", facts(version=2), {"train": [0]})
    with new_artifact(tmp_path / "outputs", "dataset", {}):
        pass
    with pytest.raises(UserError, match="is a 'dataset', but a 'teacher-outputs' is needed"):
        TeacherOutputs.open(tmp_path / "outputs")


def test_outputs_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    OutputsWriter(tmp_path, facts())
    OutputsWriter(tmp_path, facts(), writer=1)
    with pytest.raises(UserError, match=r"teacher: sha256:u, not sha256:t; seq_length: 6, not 5"):
        OutputsWriter(tmp_path, facts(teacher="sha256:u", seq_length=6))


def test_facts_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    OutputsWriter(tmp_path, facts())
    (tmp_path / "facts.json").write_text("")
    with pytest.raises(UserError, match=r"facts.json: cannot be read: .*; remove"):
        OutputsWriter(tmp_path, facts())


def test_nothing_to_write_leaves_nothing(tmp_path: Path) -> None:
    writer = OutputsWriter(tmp_path, facts())
    writer.write("train", [], [])
    assert writer.finish({"train": 9})["bytes_per_token"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_killed_at_any_byte_it_goes_on(tmp_path: Path) -> None:
    """Cut off anywhere; the index may have gone to the disk before the records."""
    of, samples = facts("sampled"), [4, 0, 2]
    whole = tmp_path / "whole"
    writer = OutputsWriter(whole, of)
    for sample in samples:
        writer.write("train", [sample], encoded(of, "train", [sample]))
    writer.close()
    sizes = [len(record) for record in encoded(of, "train", samples)]
    ends = [sum(sizes[:n]) for n in range(4)]
    records, index = (whole / RECORDS).stat().st_size, (whole / INDEX).stat().st_size
    assert ends[-1] == records
    cuts = {(n, index) for n in range(0, records, 29)} | {(records, n) for n in range(0, index, 5)}
    cuts |= {(end, n * ENTRY.itemsize + 5) for n, end in enumerate(ends[1:])}
    for number, (of_records, of_index) in enumerate(sorted(cuts)):
        folder = tmp_path / f"cut-{number}"
        shutil.copytree(whole, folder)
        os.truncate(folder / RECORDS, of_records)
        os.truncate(folder / INDEX, of_index)
        writer = OutputsWriter(folder, of)
        there = min(sum(end <= of_records for end in ends[1:]), of_index // ENTRY.itemsize)
        missing = writer.missing("train", [0, 2, 4])
        assert missing == [n for n in (0, 2, 4) if n not in samples[:there]]
        if missing:
            writer.write("train", missing, encoded(of, "train", missing))
        assert writer.finish({"train": 9})["samples"] == {"train": {"stored": 3, "of": 9}}
        assert sum(path.stat().st_size for path in folder.glob("train/*.records")) == records


def test_what_the_disk_lost_is_asked_for_anew(folder: Path) -> None:
    """Zeros instead of what was written, as after a power cut; and an index without records."""
    for name in (RECORDS, INDEX):
        size = (folder / name).stat().st_size
        os.truncate(folder / name, size // 4 * 2)
        os.truncate(folder / name, size)
    (folder / "train/00003-00000.index").write_bytes(b"")
    assert OutputsWriter(folder, facts()).missing("train", [0, 3, 5, 7]) == [3, 5]
    (folder / INDEX).unlink()
    assert OutputsWriter(folder, facts()).missing("train", [0, 3, 5, 7]) == [0, 3, 5, 7]
    assert list((folder / "train").iterdir()) == []


def test_a_killed_writers_leftovers_do_not_become_part_of_it(tmp_path: Path) -> None:
    (tmp_path / ".facts.json.1.partial").touch()
    writer = OutputsWriter(tmp_path, facts())
    writer.write("train", [0], encoded(facts(), "train", [0]))
    writer.finish({"train": 1})
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert names == {"facts.json", RECORDS, INDEX}


def test_shards_are_of_a_size_and_writers_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flagscale.teacher_outputs.shards.SHARD_BYTES", 300)
    with new_artifact(tmp_path / "outputs", KIND, {}) as staging:
        writers = [OutputsWriter(staging.path, facts(), rank) for rank in range(2)]
        for sample in range(6):
            records = encoded(facts(), "train", [sample])
            writers[sample % 2].write("train", [sample], records)
        writers[1].write("train", [0], encoded(facts(), "train", [0]))  # there already
        for writer in writers:
            writer.close()
        staging.facts = OutputsWriter(staging.path, facts()).finish({"train": 6})
    shards = sorted(path.name for path in (tmp_path / "outputs/train").glob("*.records"))
    assert shards == [f"{rank:05d}-{n:05d}.records" for rank in range(2) for n in range(2)]
    reader = TeacherOutputs.open(tmp_path / "outputs")
    assert reader.manifest_facts["samples"]["train"] == {"stored": 6, "of": 6}
    read = reader.read("train", range(6))
    assert isinstance(read, Hidden)
    assert torch.equal(read.hidden_bsh, torch.stack([answers(facts(), n) for n in range(6)]))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = OutputsWriter(tmp_path, facts())
    records = encoded(facts(), "train", [0])
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(ShardWriter, "_new", lambda _: (full, full))
        with pytest.raises(UserError, match="no space left on the disk"):
            writer.write("train", [0], records)


def test_an_object_store_is_read_in_parts(
    folder: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGSCALE_SHARED", f"{bucket}/distillation")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with step_process("cache-teacher") as step:
        shutil.copytree(folder, step.output(str(tmp_path / "pointer")))
    with step_process("distil-student") as step:
        artifact = dsl.Dataset(uri=str(tmp_path / "pointer"))
        found = step.input("teacher_outputs", artifact, in_parts=True)
    here, there = TeacherOutputs.open(folder), TeacherOutputs.open(found)
    assert there.manifest == here.manifest
    samples = [5, 7, 0]
    assert torch.equal(
        there.read("train", samples).hidden_bsh, here.read("train", samples).hidden_bsh
    )
    with pytest.raises(UserError, match=r"s3://.*no answer to sample 4 of train"):
        there.read("train", [4])

    pointer = read_pointer(tmp_path / "pointer")
    assert pointer
    store = ObjectStore(pointer.location)
    content = bytearray((folder / RECORDS).read_bytes())
    content[-1] ^= 1
    store.write(RECORDS, bytes(content))
    there.read("train", [7])
    with pytest.raises(UserError, match=r"s3://.*sample 5 of train .* is damaged"):
        there.read("train", [5])
    store.write(RECORDS, bytes(content[:-1]))
    with pytest.raises(UserError, match=r"bytes, but .* were written"):
        TeacherOutputs.open(tmp_path / "pointer")
