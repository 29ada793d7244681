"""Step 5: teacher, student before and student after on the test split -> `evaluation`."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from flagscale import tracking
from flagscale.artifacts import Manifest, open_artifact
from flagscale.data.loader import split_documents
from flagscale.errors import UserError
from flagscale.evaluation import SUMMARY
from flagscale.evaluation.fidelity import ALL_FIGURES, TEACHER, Fidelity, document_hash
from flagscale.evaluation.figures import AFTER, BEFORE, scalars
from flagscale.evaluation.generation.generate import continuations
from flagscale.evaluation.generation.prompts import encode_prompts
from flagscale.evaluation.measure.measuring import keep, measure_closely
from flagscale.evaluation.measure.teacher import KeptTeacher, check_room
from flagscale.evaluation.measure.windows import batches
from flagscale.evaluation.report.verdict import verdict
from flagscale.execution import launch
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.causal_lm import CausalLM, is_first_replica
from flagscale.models.megatron import from_last_stage, load_model
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import EvaluationRecipe, ModelsRecipe
from flagscale.steps.evaluation_files import (
    FILES,
    MODELS,
    Measured,
    report_data,
    token_table,
    what_was_measured,
    write,
)
from flagscale.steps.on_ranks import tracked, written
from flagscale.steps.recording import tell_figures

logger = logging.getLogger(__name__)

_KINDS = {
    "dataset": "dataset",
    TEACHER: "teacher",
    BEFORE: "student",
    AFTER: "distilled-student",
}


class Paths(NamedTuple):
    """The arguments of `evaluate` that are places, and one for what is only needed meanwhile."""

    teacher: Path
    student: Path
    distilled: Path
    dataset: Path
    output: Path
    scratch: Path


def evaluate(
    evaluation: EvaluationRecipe,
    teacher: Path,
    student: Path,
    distilled: Path,
    dataset: Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
) -> dict[str, float]:
    """Compare the student, before and after distillation, with its teacher.

    Args:
        evaluation: the recipe's section.
        teacher: a `teacher` artifact.
        student: the `student` artifact that training started from.
        distilled: the `distilled-student` artifact that came out.
        dataset: the `dataset` artifact whose test split is measured on.
        output: folder of the `evaluation` artifact: report.html, report.json of which it is made,
            metrics.json, and per_document.jsonl for `flagscale.evaluation.compare`.
        models: how the step is spread over processes.

    Returns:
        `<model>/<figure>` for each figure of `flagscale.evaluation.figures.SHOWN` and `DETAILS`,
        `<model>/ece` and `<model>/overconfidence`, `kl_reduction` (a share; left out where the
        student began as a copy of the teacher), `documents` and `tokens`.

    Raises:
        UserError: the artifacts do not belong together, there are fewer than two test documents,
            a prompt has no tokens, the disk is too small, or a model is broken.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-evaluate-") as scratch:
        paths = Paths(teacher, student, distilled, dataset, output, Path(scratch))
        facts = _open(paths, check_files=False)["dataset"].facts
        _prompts(evaluation, paths, facts, load_tokenizer(dataset / "tokenizer"))
        tokens = sum(len(document) - 1 for document in _documents(dataset, evaluation))
        hidden_size = ModelShape.load(teacher).hidden_size
        check_room(paths.scratch, tokens, hidden_size, platform.training_dtype("auto"))
        return launch.call_on_ranks(
            "evaluate",
            evaluate_on_rank,
            models.processes,
            evaluation=evaluation,
            paths=paths,
            models=models,
        )


def evaluate_on_rank(
    evaluation: EvaluationRecipe, paths: Paths, models: ModelsRecipe
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `evaluate`."""
    parents = _open(paths, check_files=launch.is_first_rank())
    recipe = {"evaluation": evaluation.model_dump(mode="json")}
    figures: dict[str, float] = {}
    with (
        tracked("evaluate", recipe, parents=parents) as run,
        platform.runtime(parallelism=models.sizes),
        written(paths.output, "evaluation", recipe, parents, run) as staging,
    ):
        measured = _run_models(evaluation, paths, parents["dataset"], models)
        if launch.is_first_rank():
            data = report_data(evaluation, _folders(paths), parents, measured)
            write(staging.path, data)
            staging.tokenizer_hash = parents["dataset"].tokenizer_hash
            staging.facts = {
                "metrics": data.metrics,
                "generations": data.generations,
                "measured": what_was_measured(parents),
            }
            figures = scalars(data.metrics)
            test = tracking.Split.of(parents["dataset"], "test")
            tell_figures(run, figures, {name: parents[name] for name in MODELS}, test)
            summary = (staging.path / SUMMARY).read_text(encoding="utf-8")
            run.describe(summary, pipeline=True)
            for name in FILES:
                run.log_artifact(staging.path / name)
            logger.info("%s", verdict(data))
    return figures


def _folders(paths: Paths) -> dict[str, Path]:
    return {name: getattr(paths, name) for name in _KINDS}


def _open(paths: Paths, *, check_files: bool) -> dict[str, Manifest]:
    """Check that the artifacts were made from one another, and that they are whole."""
    folders = _folders(paths)
    manifests = {
        name: open_artifact(folders[name], kind, check_files) for name, kind in _KINDS.items()
    }
    for name, manifest in manifests.items():
        for parent, found in manifest.parents.items():
            if parent in manifests and found != manifests[parent].digest:
                raise UserError(
                    f"{folders[name]}: was made from another {parent} than {folders[parent]}; "
                    "give the artifacts of one run"
                )
        if manifest.tokenizer_hash != manifests["dataset"].tokenizer_hash:
            raise UserError(
                f"{folders[name]}: its tokenizer ({manifest.tokenizer_hash}) is not that of "
                f"{paths.dataset} ({manifests['dataset'].tokenizer_hash})"
            )
    return manifests


def _prompts(
    evaluation: EvaluationRecipe,
    paths: Paths,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
) -> list[list[int]]:
    vocab_size = ModelShape.load(paths.teacher).vocab_size
    return encode_prompts(evaluation.prompts, tokenizer, facts["bos_id"], vocab_size)


def _documents(dataset: Path, evaluation: EvaluationRecipe) -> list[np.ndarray]:
    """The chosen test documents, cut where the recipe says."""
    documents = split_documents(dataset, "test", evaluation.max_documents)
    longest = evaluation.max_document_tokens
    # A document's first token is not predicted.
    return [document[: longest + 1] if longest else document for document in documents]


def _run_models(
    evaluation: EvaluationRecipe, paths: Paths, dataset: Manifest, layout: ModelsRecipe
) -> Measured:
    """Load and run one model after the other; all ranks know the outcome."""
    tokenizer = load_tokenizer(paths.dataset / "tokenizer")
    prompts = _prompts(evaluation, paths, dataset.facts, tokenizer)
    stop_ids = {int(dataset.facts["eod_id"]), tokenizer.eos_token_id}
    seq_length = int(dataset.facts["seq_length"])
    documents = _documents(paths.dataset, evaluation)
    text = batches(documents, seq_length, evaluation.micro_batch_size)
    kept = KeptTeacher(paths.scratch, writes=is_first_replica())
    sums: dict[str, np.ndarray] = {}
    tokens: dict[str, np.ndarray] = {}
    texts: dict[str, list[list[int]]] = {}
    for name in MODELS:
        model = _load(getattr(paths, name), seq_length, layout)
        if name == TEACHER:
            keep(model, kept, text)
        else:
            found = measure_closely(name, model, kept, text, len(documents))
            (sums[TEACHER], sums[name]), tokens[name] = (_of_last_stage(one) for one in found)
        logger.info("writing %d continuations with the %s model", len(prompts), name)
        new_tokens = evaluation.max_new_tokens
        texts[name] = continuations(model, prompts, new_tokens, stop_ids, seq_length)
        del model  # before the next is loaded
        torch.distributed.barrier()  # what is kept of the teacher has been written
    fidelity = Fidelity(
        documents=tuple(document_hash(document) for document in documents),
        tokens_d=np.array([len(document) - 1 for document in documents], dtype=np.int64),
        sums={name: dict(zip(ALL_FIGURES, values, strict=True)) for name, values in sums.items()},
    )
    return Measured(fidelity, token_table(documents, seq_length, tokens), documents, texts)


def _of_last_stage(values: np.ndarray) -> np.ndarray:
    """Its values on every rank."""
    found: np.ndarray = (
        from_last_stage(torch.from_numpy(values).to(platform.device())).cpu().numpy()
    )
    return found


def _load(artifact: Path, seq_length: int, layout: ModelsRecipe) -> CausalLM:
    gc.collect()  # modules refer to each other: the model before goes only now
    model = load_model(artifact, seq_length, layout.sizes, platform.training_dtype("auto"))
    # A layer of one's own may keep something else than keys and values, or nothing.
    return CausalLM(model, can_cache=ModelShape.load(artifact).architecture.spec is None)
