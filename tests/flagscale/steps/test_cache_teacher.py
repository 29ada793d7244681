"""cache-teacher: transformers' hidden states, the same on every layout, resumed after a kill."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic_core import to_jsonable_python
from transformers import AutoModelForCausalLM

from flagscale.artifacts import open_artifact
from flagscale.data.numbered import NumberedSamples
from flagscale.errors import Interrupted, UserError
from flagscale.execution.launch import run_on_ranks
from flagscale.recipe import LayoutRecipe, MetRecipe, ModelsRecipe, TeacherOutputsRecipe
from flagscale.shared.store import ObjectStore
from flagscale.steps.cache_teacher import Paths, cache_teacher
from flagscale.steps.outputs import mirror as outputs_mirror
from flagscale.teacher_outputs import Hidden, OutputsWriter, SparseTargets, TeacherOutputs

MET = MetRecipe(train=((1, 9), (2, 4)), validation=3)
CODECS = {
    "hidden": TeacherOutputsRecipe(),
    "sampled": TeacherOutputsRecipe(codec="sampled", draws=20),
    "topk": TeacherOutputsRecipe(codec="topk", top_k=8),
}


def cached(
    folder: Path,
    teacher: Path,
    dataset: Path,
    outputs: TeacherOutputsRecipe = CODECS["hidden"],
    met: MetRecipe = MET,
    **sizes: int,
) -> TeacherOutputs:
    models = ModelsRecipe(parallelism=LayoutRecipe(**sizes))
    cache_teacher(outputs, met, teacher, dataset, folder / "work", folder / "outputs", models)
    return TeacherOutputs.open(folder / "outputs")


@pytest.fixture(scope="module", params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(codec: str, teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(codec)
    return cached(folder, teacher, dataset, CODECS[codec])


def numbers(dataset: Path, tmp_path: Path) -> dict[str, list[int]]:
    train = NumberedSamples(dataset, tmp_path, "train")
    return {
        "train": sorted({*train.first(9, 1), *train.first(4, 2)}),
        "validation": NumberedSamples(dataset, tmp_path, "validation").first(3),
    }


def test_what_trainings_meet_is_there(
    alone: TeacherOutputs, dataset: Path, tmp_path: Path, codec: str
) -> None:
    facts = alone.manifest_facts
    for split, met in numbers(dataset, tmp_path).items():
        assert not alone.missing(split, met)
        there = NumberedSamples(dataset, tmp_path, split)
        assert facts["samples"][split] == {"stored": len(met), "of": len(there)}
    manifest = alone.manifest
    assert manifest.parents["dataset"] == open_artifact(dataset, "dataset", False).digest
    assert manifest.tokenizer_hash == facts["tokenizer"]
    assert facts["codec"]["name"] == codec


@pytest.mark.parametrize("reset_attention_mask", [False, True])
def test_hidden_states_are_transformers(
    reset_attention_mask: bool, teacher: Path, dataset: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Of packed samples, each document is run by itself."""
    met = MET.model_copy(update={"reset_attention_mask": reset_attention_mask})
    found = cached(tmp_path, teacher, dataset, met=met)
    there = NumberedSamples(dataset, tmp_path, "train", reset_attention_mask)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).model
    for number in there.first(9, 1):
        (batch,) = there.batches([[number]])
        tokens = batch["tokens"]
        borders = batch["cu_seqlens"].tolist() if reset_attention_mask else [0, tokens.size(1)]
        with torch.no_grad():
            pieces = [
                model(tokens[:, begin:end]).last_hidden_state
                for begin, end in itertools.pairwise(borders)
            ]
        hidden = found.read("train", [number])
        assert isinstance(hidden, Hidden)
        torch.testing.assert_close(hidden.hidden_bsh, torch.cat(pieces, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["TP2", "PP2"],
)
def test_same_on_every_layout(
    alone: TeacherOutputs, teacher: Path, dataset: Path, tmp_path: Path, codec: str, sizes: dict
) -> None:
    check_same(cached(tmp_path, teacher, dataset, CODECS[codec], **sizes), alone, dataset, tmp_path)


def test_copies_share_the_samples(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    """On more accelerators than one copy needs: here four processes, TP2 and two copies."""
    expected = cached(tmp_path / "alone", teacher, dataset)
    models = ModelsRecipe(parallelism=LayoutRecipe(tensor_model_parallel_size=2))
    paths = Paths(teacher, dataset, str(tmp_path / "work"), tmp_path / "outputs")
    values = {"outputs": CODECS["hidden"], "met": MET, "paths": paths, "models": models}
    request = to_jsonable_python(values)
    run_on_ranks("cache-teacher", "flagscale.steps.cache_teacher:cache_on_rank", request, 4)
    found = TeacherOutputs.open(tmp_path / "outputs")
    writers = {path.name[:5] for path in (tmp_path / "outputs/train").glob("*.records")}
    assert len(writers) == 2
    check_same(found, expected, dataset, tmp_path)


def check_same(
    found: TeacherOutputs, expected: TeacherOutputs, dataset: Path, tmp_path: Path
) -> None:
    for split, met in numbers(dataset, tmp_path).items():
        ours, theirs = found.read(split, met), expected.read(split, met)
        if isinstance(ours, Hidden):
            torch.testing.assert_close(ours.hidden_bsh, theirs.hidden_bsh, rtol=1e-5, atol=1e-5)
            continue
        assert isinstance(ours, SparseTargets)
        # Where a probability differs by rounding, a draw may fall beside it.
        same = (dense(ours) - dense(theirs)).abs().sum(-1) < 1e-3
        assert same.float().mean() > 0.99
        torch.testing.assert_close(ours.entropy_bs, theirs.entropy_bs, rtol=1e-4, atol=1e-4)


def dense(targets: SparseTargets) -> torch.Tensor:
    shares = torch.zeros(*targets.tokens_bsk.shape[:2], 1000)
    return shares.scatter_add(-1, targets.tokens_bsk, targets.shares_bsk)


def test_nothing_asked_nothing_run(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    """As of a run whose trainings were all told to have no teacher."""
    found = cached(tmp_path, teacher, dataset, met=MetRecipe())
    assert found.manifest_facts["samples"] == {}


def test_everything(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    found = cached(tmp_path, teacher, dataset, CODECS["topk"], met=MetRecipe(everything=True))
    for split in found.manifest_facts["samples"].values():
        assert split["stored"] == split["of"] > 0


def stop_after_a_write(patch: pytest.MonkeyPatch) -> None:
    write = OutputsWriter.write

    def stopped(writer: OutputsWriter, *what: object) -> None:
        write(writer, *what)
        patch.setattr(OutputsWriter, "write", interrupted)

    def interrupted(*_: object) -> None:
        raise Interrupted("asked to stop")

    patch.setattr(OutputsWriter, "write", stopped)


SEVERAL_PASSES = MetRecipe(train=((1, 40),))


def test_stopped_and_begun_again(
    teacher: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered is not asked again, and nothing is left when the artifact is in place."""
    with monkeypatch.context() as patch:
        stop_after_a_write(patch)
        with pytest.raises(Interrupted):
            cached(tmp_path, teacher, dataset, met=SEVERAL_PASSES)
    assert not (tmp_path / "outputs").exists()
    (work,) = (path for path in (tmp_path / "work").iterdir() if path.is_dir())
    before = files(work / "outputs/train")
    found = cached(tmp_path, teacher, dataset, met=SEVERAL_PASSES)
    after = files(tmp_path / "outputs/train")
    assert 0 < len(before) < len(after)
    assert before.items() <= after.items()
    there = NumberedSamples(dataset, tmp_path, "train").first(40, 1)
    whole = cached(tmp_path / "whole", teacher, dataset, met=SEVERAL_PASSES)
    assert torch.equal(found.read("train", there).hidden_bsh, whole.read("train", there).hidden_bsh)
    assert not work.exists()


def test_killed_and_begun_again(
    teacher: Path,
    dataset: Path,
    tmp_path: Path,
    torchrun: Callable[..., object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With -9, while it writes: nobody had a chance to put anything in order."""
    worker = Path(__file__).with_name("killed_cache_worker.py")
    with pytest.raises(subprocess.CalledProcessError):
        torchrun(1, worker, tmp_path / "work", tmp_path / "outputs", teacher, dataset)
    assert not (tmp_path / "outputs").exists()
    with caplog.at_level("INFO"):
        found = cached(tmp_path, teacher, dataset, met=SEVERAL_PASSES)
    there, of = re.findall(r"going on: (\d+) of (\d+) samples are there", caplog.text)[0]
    assert 0 < int(there) < int(of) == 40
    numbers = NumberedSamples(dataset, tmp_path, "train").first(40, 1)
    whole = cached(tmp_path / "whole", teacher, dataset, met=SEVERAL_PASSES)
    ours, theirs = (one.read("train", numbers).hidden_bsh for one in (found, whole))
    assert torch.equal(ours, theirs)
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_pod_goes_on_from_the_object_store(
    teacher: Path, dataset: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's disk is gone with it."""
    checkpoints, store = f"{bucket}/checkpoints", ObjectStore(bucket)
    models, hidden = ModelsRecipe(), CODECS["hidden"]
    monkeypatch.setattr(outputs_mirror, "_SECONDS", 0.0)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    rest = (teacher, dataset, checkpoints, tmp_path / "outputs", models)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "first"))
        stop_after_a_write(patch)
        with pytest.raises(Interrupted):
            cache_teacher(hidden, SEVERAL_PASSES, *rest)
    uploaded = {name.split("/")[-1] for name in store.sizes()}
    assert {"facts.json", "00000-00000.records", "00000-00000.index"} == uploaded
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "second"))
    cache_teacher(hidden, SEVERAL_PASSES, *rest)
    assert len(files(tmp_path / "outputs/train")) > 2
    found = TeacherOutputs.open(tmp_path / "outputs")
    there = NumberedSamples(dataset, tmp_path, "train").first(40, 1)
    assert not found.missing("train", there)
    assert not store.sizes()


def test_no_room(
    teacher: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"outputs of [\d,]+ tokens take 0.0 GB .256 bytes a token"):
        cached(tmp_path, teacher, dataset)


def test_not_the_teachers_tokens(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "dataset"
    other.mkdir()
    for path in dataset.iterdir():
        (other / path.name).symlink_to(path)
    manifest = json.loads((dataset / "manifest.json").read_text())
    (other / "manifest.json").unlink()
    (other / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_hash": "sha256:0"}))
    with pytest.raises(UserError, match=r"its tokenizer .* is not that of"):
        cached(tmp_path, teacher, other)
