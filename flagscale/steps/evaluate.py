"""Step 5: teacher, student before and student after on the test split -> `evaluation`."""

from __future__ import annotations

import gc
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from flagscale import tracking
from flagscale.artifacts import Manifest, open_artifact, write_json
from flagscale.checkpoint import count_parameters
from flagscale.data.loader import split_documents
from flagscale.errors import UserError
from flagscale.evaluation import METRICS, PER_DOCUMENT, REPORT
from flagscale.evaluation.fidelity import FIGURES, TEACHER, Fidelity, document_hash
from flagscale.evaluation.figures import AFTER, BEFORE, scalars, summarise
from flagscale.evaluation.generate import continuations
from flagscale.evaluation.measuring import keep, measure
from flagscale.evaluation.prompts import encode_prompts
from flagscale.evaluation.report import ReportData, headline, render
from flagscale.evaluation.teacher import KeptTeacher, check_room
from flagscale.evaluation.windows import batches
from flagscale.execution import launch
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.causal_lm import CausalLM, is_first_replica
from flagscale.models.megatron import WEIGHTS, from_last_stage, load_model
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import EvaluationRecipe, ModelsRecipe
from flagscale.steps.on_ranks import tracked, written
from flagscale.steps.recording import tell_figures

logger = logging.getLogger(__name__)

_BOOTSTRAP_SEED = 0
_KINDS = {
    "dataset": "dataset",
    TEACHER: "teacher",
    BEFORE: "student",
    AFTER: "distilled-student",
}
_MODELS = (TEACHER, BEFORE, AFTER)


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
        output: folder of the `evaluation` artifact: report.html, metrics.json, and
            per_document.jsonl for `flagscale.evaluation.compare`.
        models: how the step is spread over processes.

    Returns:
        `<model>/<figure>` for each figure of `flagscale.evaluation.figures.SHOWN`,
        `kl_reduction` (a share; left out where the student began as a copy of the teacher),
        `documents` and `tokens`.

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
        fidelity, texts = _run_models(evaluation, paths, parents["dataset"], models)
        if launch.is_first_rank():
            metrics = _metrics(evaluation, fidelity, parents["dataset"], paths)
            generations = _generations(evaluation, paths, texts)
            html = _report(metrics, fidelity, generations, parents, recipe, paths)
            _write(staging.path, metrics, fidelity, html)
            staging.tokenizer_hash = parents["dataset"].tokenizer_hash
            staging.facts = {
                "metrics": metrics,
                "generations": generations,
                "measured": _measured(parents),
            }
            figures = scalars(metrics)
            test = tracking.Split.of(parents["dataset"], "test")
            tell_figures(run, figures, {name: parents[name] for name in _MODELS}, test)
            for name in (REPORT, METRICS, PER_DOCUMENT):
                run.log_artifact(staging.path / name)
            logger.info("%s", headline(metrics))
    return figures


def _open(paths: Paths, *, check_files: bool) -> dict[str, Manifest]:
    """Check that the artifacts were made from one another, and that they are whole."""
    folders = {name: getattr(paths, name) for name in _KINDS}
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
) -> tuple[Fidelity, dict[str, list[list[int]]]]:
    """Load and run one model after the other: figures, on every rank, and continuations."""
    tokenizer = load_tokenizer(paths.dataset / "tokenizer")
    prompts = _prompts(evaluation, paths, dataset.facts, tokenizer)
    stop_ids = {int(dataset.facts["eod_id"]), tokenizer.eos_token_id}
    seq_length = int(dataset.facts["seq_length"])
    documents = _documents(paths.dataset, evaluation)
    text = batches(documents, seq_length, evaluation.micro_batch_size)
    kept = KeptTeacher(paths.scratch, writes=is_first_replica())
    sums, texts = {}, {}
    for name in _MODELS:
        model = _load(getattr(paths, name), seq_length, layout)
        if name == TEACHER:
            keep(model, kept, text)
        else:
            sums_mfd = torch.from_numpy(measure(name, model, kept, text, len(documents)))
            sums_mfd = from_last_stage(sums_mfd.to(platform.device())).cpu()
            sums[TEACHER], sums[name] = sums_mfd.numpy()
        logger.info("writing %d continuations with the %s model", len(prompts), name)
        new_tokens = evaluation.max_new_tokens
        texts[name] = continuations(model, prompts, new_tokens, stop_ids, seq_length)
        del model  # before the next is loaded
        torch.distributed.barrier()  # what is kept of the teacher has been written
    fidelity = Fidelity(
        documents=tuple(document_hash(document) for document in documents),
        tokens_d=np.array([len(document) - 1 for document in documents], dtype=np.int64),
        sums={name: dict(zip(FIGURES, values, strict=True)) for name, values in sums.items()},
    )
    return fidelity, texts


def _load(artifact: Path, seq_length: int, layout: ModelsRecipe) -> CausalLM:
    gc.collect()  # modules refer to each other: the model before goes only now
    model = load_model(artifact, seq_length, layout.sizes, platform.training_dtype("auto"))
    # A layer of one's own may keep something else than keys and values, or nothing.
    return CausalLM(model, can_cache=ModelShape.load(artifact).architecture.spec is None)


def _metrics(
    evaluation: EvaluationRecipe, fidelity: Fidelity, dataset: Manifest, paths: Paths
) -> dict[str, Any]:
    metrics = summarise(
        fidelity, evaluation.bootstrap_samples, evaluation.confidence, _BOOTSTRAP_SEED
    )
    parameters = {name: count_parameters(getattr(paths, name) / WEIGHTS) for name in _MODELS}
    return metrics | {
        "seq_length": int(dataset.facts["seq_length"]),
        "kinds": sorted({corpus["kind"] for corpus in dataset.facts["corpora"]}),
        "parameters": parameters,
    }


def _generations(
    evaluation: EvaluationRecipe, paths: Paths, texts: Mapping[str, Sequence[list[int]]]
) -> list[dict[str, str]]:
    """Each prompt with the models' continuations."""
    tokenizer = load_tokenizer(paths.dataset / "tokenizer")
    return [
        {"prompt": prompt} | {name: str(tokenizer.decode(new[i])) for name, new in texts.items()}
        for i, prompt in enumerate(evaluation.prompts)
    ]


def _report(
    metrics: Mapping[str, Any],
    fidelity: Fidelity,
    generations: Sequence[Mapping[str, str]],
    parents: Mapping[str, Manifest],
    recipe: Mapping[str, Any],
    paths: Paths,
) -> str:
    return render(
        ReportData(
            metrics=metrics,
            fidelity=fidelity,
            training=_read_log(paths.distilled / "training.jsonl"),
            validation=_read_log(paths.distilled / "validation.jsonl"),
            generations=generations,
            layers={name: ModelShape.load(getattr(paths, name)).num_layers for name in _MODELS},
            parameters=metrics["parameters"],
            manifests=parents,
            evaluation=recipe["evaluation"],
        )
    )


def _measured(manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """What the student is and how it was trained: by it a sweep knows which variant this is."""
    return {
        "recipe": manifests[BEFORE].recipe | manifests[AFTER].recipe,
        "training": {
            name: value for name, value in manifests[AFTER].facts.items() if name != "seq_length"
        },
    }


def _read_log(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write(folder: Path, metrics: Mapping[str, Any], fidelity: Fidelity, html: str) -> None:
    write_json(folder / METRICS, metrics)
    with (folder / PER_DOCUMENT).open("w", encoding="utf-8") as stream:
        for row in fidelity.rows():
            stream.write(json.dumps(row) + "\n")
    (folder / REPORT).write_text(html, encoding="utf-8")
