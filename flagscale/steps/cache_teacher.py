"""cache-teacher: what the teacher makes of a dataset's samples, once, for every training of it.

The outputs are kept by sample: they serve any seed, order, batch size and layout. What is written
lies in a folder that outlives the process until the artifact is in place: a step that was stopped
goes on there.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from flagscale.artifacts import Manifest, digest, open_artifact
from flagscale.checkpoint.agreement import on_first_rank
from flagscale.data.loader import prepare_index
from flagscale.data.numbered import NumberedSamples
from flagscale.errors import UserError
from flagscale.execution.launch import call_on_ranks, is_first_rank
from flagscale.execution.step_process import keep_exclusive, when_published
from flagscale.megatron import platform
from flagscale.models.answers import Answers, open_teacher, passes
from flagscale.models.outputs_bias import SAMPLES, STUDENT, measured_bias
from flagscale.models.token_progress import TokenProgress
from flagscale.recipe import MetRecipe, ModelsRecipe, TeacherOutputsRecipe
from flagscale.steps.on_ranks import tracked, written
from flagscale.steps.outputs.facts import DTYPES, check_room, outputs_facts
from flagscale.steps.outputs.mirror import OutputsMirror
from flagscale.teacher_outputs import KIND, OutputsFacts, OutputsWriter, codec_of
from flagscale.tracking import Split
from flagscale.train.checkpoints import mirror

logger = logging.getLogger(__name__)

_PASS_TOKENS = {"cpu": 1024, "cuda": 8192}  # enough for matrix products to be fast


class Paths(NamedTuple):
    """The arguments of `cache_teacher` that are places."""

    teacher: Path
    dataset: Path
    checkpoints: str
    output: Path


def cache_teacher(
    outputs: TeacherOutputsRecipe,
    met: MetRecipe,
    teacher: Path,
    dataset: Path,
    checkpoints: str | Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
) -> dict[str, float]:
    """Run the teacher on samples of a dataset, and keep what it makes of them.

    Args:
        outputs: the recipe's section.
        met: which samples, and how training runs the teacher.
        teacher: a `teacher` artifact.
        dataset: a `dataset` artifact.
        checkpoints: folder that outlives the process, or URL of one in an object store; the step
            keeps to one inside whose name follows from what is kept. That goes when the step's
            output is in place.
        output: the `teacher-outputs` artifact to write.
        models: how the teacher is spread over processes; on more accelerators than that needs,
            copies of it share the samples.

    Returns:
        `samples`, `bytes`, `bytes per token`; how far they are from the teacher on held-out text:
        `kl`, `gradient error`, `gradient bias` (`flagscale.teacher_outputs.bias`); and of what was
        not there yet `tokens per second`.

    Raises:
        UserError: an input is missing or damaged, the two do not belong together, or the disk is
            too small.
        Interrupted: it was asked to stop; what has been written stays.
    """
    paths = Paths(teacher, dataset, str(checkpoints), output)
    parents = _parents(paths, check_files=False)
    name = _name(outputs_facts(outputs, met, paths.teacher, parents))
    keep_exclusive(f"{paths.checkpoints}/{name}")
    figures = call_on_ranks(
        "cache-teacher",
        cache_on_rank,
        _processes(models),
        outputs=outputs,
        met=met,
        paths=paths,
        models=models,
    )
    when_published(lambda: mirror.forget(paths.checkpoints, name))
    return figures


def cache_on_rank(
    outputs: TeacherOutputsRecipe, met: MetRecipe, paths: Paths, models: ModelsRecipe
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `cache_teacher`."""
    parents = _parents(paths, check_files=is_first_rank())
    facts = outputs_facts(outputs, met, paths.teacher, parents)
    folder, _ = mirror.place(paths.checkpoints, _name(facts))
    recipe = {
        "teacher_outputs": outputs.model_dump(mode="json"),
        "met": met.model_dump(mode="json"),
    }
    with (
        tracked("cache-teacher", recipe, parents=parents) as run,
        platform.runtime(parallelism=models.sizes),
        written(paths.output, KIND, recipe, parents, run) as staging,
    ):
        rank, place = torch.distributed.get_rank(), f"{paths.checkpoints}/{_name(facts)}"
        remote = OutputsMirror(place, folder / "outputs", rank)
        on_first_rank(folder, "cannot be fetched", remote.download)
        writer = OutputsWriter(folder / "outputs", facts, rank)
        asked = {} if met.is_empty else _asked(met, paths, folder / "data", facts)
        splits = [Split.of(parents["dataset"], name) for name in asked]
        run.log_inputs(splits, ["teacher outputs"] * len(splits))
        missing = _missing(writer, asked)
        tokens = facts.seq_length * sum(map(len, missing.values()))
        room = partial(check_room, outputs, facts, paths.teacher, folder, tokens)
        on_first_rank(folder, "cannot be written", room)
        speed, bias = 0.0, {}
        if asked:
            teacher = _open(facts, missing, paths, models)
            speed = _answer(writer, remote, facts, teacher, missing, asked)
            bias = _bias(facts, teacher, asked["validation"])
        writer.close()
        torch.distributed.barrier()
        figures: dict[str, float] = {}
        if is_first_rank():
            totals = {split: len(samples.there) for split, samples in asked.items()}
            staging.facts = writer.finish(totals) | {"bias": {**bias, "student": STUDENT}}
            staging.tokenizer_hash = facts.tokenizer
            figures = _figures(staging.facts, speed, writer.folder)
            shutil.copytree(writer.folder, staging.path, dirs_exist_ok=True, copy_function=_link)
            run.log_metrics(figures)
    return figures


class _Asked(NamedTuple):
    """The samples of a split.

    Attributes:
        there: all of them.
        numbers: of those that are asked for.
    """

    there: NumberedSamples
    numbers: list[int]


def _parents(paths: Paths, *, check_files: bool) -> dict[str, Manifest]:
    parents = {
        name: open_artifact(getattr(paths, name), name, check_files)
        for name in ("teacher", "dataset")
    }
    own, used = (parents[name].tokenizer_hash for name in ("teacher", "dataset"))
    if own != used:
        raise UserError(
            f"{paths.teacher}: its tokenizer ({own}) is not that of {paths.dataset} ({used})"
        )
    return parents


def _name(facts: OutputsFacts) -> str:
    """Of this work: other work may use `checkpoints` at the same time."""
    return f"teacher-outputs-{digest(facts.values()).removeprefix('sha256:')[:16]}"


def _processes(models: ModelsRecipe) -> int:
    """As many copies of the teacher as there are accelerators for."""
    copies = torch.cuda.device_count() // models.processes if platform.HAS_GPU else 1
    return models.processes * max(1, copies)


def _asked(met: MetRecipe, paths: Paths, cache: Path, facts: OutputsFacts) -> dict[str, _Asked]:
    def build() -> None:
        prepare_index(paths.dataset, cache)

    on_first_rank(cache, "cannot be written", build)
    found = {}
    for split in ("train", "validation"):
        there = NumberedSamples(paths.dataset, cache, split, facts.reset_attention_mask)
        found[split] = _Asked(there, there.all() if met.everything else _met(met, split, there))
    return found


def _met(met: MetRecipe, split: str, there: NumberedSamples) -> list[int]:
    if split == "validation":
        return there.first(met.validation)
    return sorted({n for seed, count in met.train for n in there.first(count, seed)})


def _missing(writer: OutputsWriter, asked: Mapping[str, _Asked]) -> dict[str, list[int]]:
    """By split, those that are not there yet; as the first rank finds it."""

    def look() -> dict[str, list[int]]:
        found = {split: writer.missing(split, one.numbers) for split, one in asked.items()}
        return {split: numbers for split, numbers in found.items() if numbers}

    missing = on_first_rank(writer.folder, "cannot be read", look)
    wanted = sum(len(one.numbers) for one in asked.values())
    left = sum(map(len, missing.values()))
    if left < wanted:
        logger.info("going on: %d of %d samples are there", wanted - left, wanted)
    return missing


def _open(
    facts: OutputsFacts, missing: Mapping[str, list[int]], paths: Paths, models: ModelsRecipe
) -> Answers:
    """The teacher, for as many samples at a time as all of its copies have work for."""
    copies = parallel_state.get_data_parallel_world_size()
    most = max(map(len, missing.values()), default=1)
    size = max(1, _PASS_TOKENS[platform.device().type] // facts.seq_length)
    return open_teacher(
        paths.teacher,
        facts.seq_length,
        models.sizes,
        DTYPES[facts.params_dtype],
        min(size, -(-most // copies)),
        facts.reset_attention_mask,
    )


def _answer(
    writer: OutputsWriter,
    remote: OutputsMirror,
    facts: OutputsFacts,
    teacher: Answers,
    missing: Mapping[str, list[int]],
    asked: Mapping[str, _Asked],
) -> float:
    """Run the teacher on what is missing; tokens a second, 0 where nothing was."""
    codec = codec_of(facts)
    total = facts.seq_length * sum(map(len, missing.values()))
    progress = TokenProgress("teacher", total)
    for split, numbers in missing.items():
        todo = passes(numbers, teacher.micro_batch_size, teacher.rank, teacher.ranks)
        batches = None
        if teacher.reads_data:
            batches = asked[split].there.batches([one.samples for one in todo])
        for one, hidden_bsh in teacher.of(todo, batches):
            if hidden_bsh is not None:
                records = teacher.encoded(codec, split, one, hidden_bsh)
                if records and teacher.writes:
                    writer.write(split, one.samples[: one.new], records)
                    remote.upload(writer)
            progress.advance(facts.seq_length * len(one.samples) * teacher.ranks)
    return progress.speed if total else 0.0


def _bias(facts: OutputsFacts, teacher: Answers, held_out: _Asked) -> dict[str, float]:
    some = held_out.there.first(SAMPLES)
    todo = passes(some, teacher.micro_batch_size, rank=0, ranks=1)
    batches = None
    if teacher.reads_data:
        batches = held_out.there.batches([one.samples for one in todo])
    return measured_bias(teacher, codec_of(facts), "validation", todo, batches, facts.vocab_size)


def _figures(told: Mapping[str, Any], speed: float, folder: Path) -> dict[str, float]:
    figures = {
        "samples": float(sum(split["stored"] for split in told["samples"].values())),
        "bytes": float(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())),
        "bytes per token": float(told["bytes_per_token"]),
    }
    figures |= {
        name.replace("_", " "): told["bias"][name]
        for name in ("kl", "gradient_error", "gradient_bias")
        if name in told["bias"]
    }
    return figures | ({"tokens per second": speed} if speed else {})


def _link(source: str, target: str) -> None:
    """A second name where that can be, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
