"""Damaged artifacts are refused by name before training changes anything, whoever has to notice."""

import shutil
from collections import Counter

import pytest

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.steps.distil_student import distil_student
from flagscale.steps.training import file_check
from flagscale.steps.training.file_check import files_checked


@pytest.fixture
def inputs(teacher, student, dataset, tmp_path):
    """Copies, to be damaged."""
    for folder in (teacher, student, dataset):
        shutil.copytree(folder, tmp_path / folder.name)
    return {folder.name: tmp_path / folder.name for folder in (teacher, student, dataset)}


def flip_a_bit(path):
    """In the middle: of weights, what is read is then a number like others."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("kind", ["teacher", "student", "dataset"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_flipped_bit_is_refused(inputs, tmp_path, kind, processes):
    flip_a_bit(largest(inputs[kind]))
    training = TrainingRecipe(
        train_iters=1, global_batch_size=2, lr=1e-3, parallelism={"processes": processes}
    )
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(UserError, match=f"{kind}: .* is missing or changed; make the {kind} anew"):
        distil_student(
            DistillationRecipe(), training, *inputs.values(), checkpoints, tmp_path / "output"
        )
    assert not (tmp_path / "output").exists()
    assert not [path for path in checkpoints.rglob("*") if path.is_file()], "changed something"


def test_ranks_divide_the_files(inputs, monkeypatch):
    manifests = {kind: open_artifact(path, kind, False) for kind, path in inputs.items()}
    everything = {(kind, file) for kind, one in manifests.items() for file in one.files}
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(file_check._share(inputs, manifests))
    assert Counter(one for share in shares for one in share) == Counter(everything)
    sizes = [sum((inputs[kind] / f).stat().st_size for kind, f in share) for share in shares]
    whole = max(path.stat().st_size for one in inputs.values() for path in one.rglob("*"))
    assert max(sizes) - min(sizes) <= whole  # files are not cut


def test_what_fails_because_of_damage_says_so(inputs):
    """A damaged file may be found by who reads it first."""
    manifests = {kind: open_artifact(path, kind, False) for kind, path in inputs.items()}
    flip_a_bit(largest(inputs["student"]))
    with (
        pytest.raises(UserError, match="is missing or changed"),
        platform.runtime(),
        files_checked(inputs, manifests),
    ):
        raise ZeroDivisionError


def test_a_lacking_file_is_refused_at_once(inputs):
    manifests = {kind: open_artifact(path, kind, False) for kind, path in inputs.items()}
    largest(inputs["student"]).unlink()
    with pytest.raises(UserError, match="is missing or changed"), files_checked(inputs, manifests):
        raise AssertionError("the body ran")
