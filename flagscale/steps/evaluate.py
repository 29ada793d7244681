"""Step 5: teacher, student before and student after on the test split -> `evaluation`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from flagscale import tracking
from flagscale.artifacts import Manifest, new_artifact, open_artifact, write_json
from flagscale.data.loader import split_documents
from flagscale.errors import UserError
from flagscale.evaluation import METRICS, PER_DOCUMENT, REPORT
from flagscale.evaluation.fidelity import TEACHER, Fidelity, measure
from flagscale.evaluation.figures import AFTER, BEFORE, scalars, summarise
from flagscale.evaluation.generate import continuations
from flagscale.evaluation.report import ReportData, headline, render
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import load_model, logits
from flagscale.models.source import load_tokenizer
from flagscale.recipe import EvaluationRecipe, ModelsRecipe

logger = logging.getLogger(__name__)

_BOOTSTRAP_SEED = 0
_KINDS = {
    "dataset": "dataset",
    TEACHER: "teacher",
    BEFORE: "student",
    AFTER: "distilled-student",
}


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
            a prompt has no tokens, or a model is broken.
    """
    folders = {"dataset": dataset, TEACHER: teacher, BEFORE: student, AFTER: distilled}
    manifests = _open(folders)
    tokenizer = load_tokenizer(dataset / "tokenizer")
    prompts = _encode(evaluation.prompts, tokenizer)
    documents = _documents(dataset, evaluation)
    recipe = {"evaluation": evaluation.model_dump(mode="json")}
    with (
        tracking.step_run("evaluate", recipe, parents=manifests) as run,
        new_artifact(output, "evaluation", recipe, manifests, run.log_artifact) as staging,
    ):
        stop_ids = {int(manifests["dataset"].facts["eod_id"]), tokenizer.eos_token_id}
        seq_length = int(manifests["dataset"].facts["seq_length"])
        fidelity, written, parameters = _run_models(
            evaluation, folders, documents, prompts, stop_ids, seq_length, models
        )
        metrics = summarise(
            fidelity, evaluation.bootstrap_samples, evaluation.confidence, _BOOTSTRAP_SEED
        )
        metrics |= {"seq_length": seq_length, "parameters": parameters}
        generations = [
            {"prompt": prompt}
            | {name: str(tokenizer.decode(new[i])) for name, new in written.items()}
            for i, prompt in enumerate(evaluation.prompts)
        ]
        html = render(
            ReportData(
                metrics=metrics,
                fidelity=fidelity,
                training=_read_log(distilled / "training.jsonl"),
                validation=_read_log(distilled / "validation.jsonl"),
                generations=generations,
                layers={m: ModelShape.load(folders[m]).num_layers for m in parameters},
                parameters=parameters,
                manifests=manifests,
                evaluation=recipe["evaluation"],
            )
        )
        _write(staging.path, metrics, fidelity, html)
        staging.tokenizer_hash = manifests["dataset"].tokenizer_hash
        staging.facts = {
            "metrics": metrics,
            "generations": generations,
            "measured": _measured(manifests),
        }
        figures = scalars(metrics)
        run.log_headline(figures)
        for name in (REPORT, METRICS, PER_DOCUMENT):
            run.log_artifact(staging.path / name)
    logger.info("%s", headline(metrics))
    return figures


def _open(folders: Mapping[str, Path]) -> dict[str, Manifest]:
    """Check that the artifacts are whole and were made from one another."""
    manifests = {name: open_artifact(folders[name], kind) for name, kind in _KINDS.items()}
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
                f"{folders['dataset']} ({manifests['dataset'].tokenizer_hash})"
            )
    return manifests


def _encode(prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    encoded = []
    for prompt in prompts:
        # As in training: documents begin with their text, without a token of their own.
        encoded.append(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if not encoded[-1]:
            raise UserError(f"evaluation.prompts: {prompt!r} has no tokens; write some text")
    return encoded


def _documents(dataset: Path, evaluation: EvaluationRecipe) -> list[np.ndarray]:
    """The chosen test documents, cut where the recipe says."""
    documents = split_documents(dataset, "test", evaluation.max_documents)
    longest = evaluation.max_document_tokens
    # A document's first token is not predicted.
    return [document[: longest + 1] if longest else document for document in documents]


def _run_models(
    evaluation: EvaluationRecipe,
    folders: Mapping[str, Path],
    documents: Sequence[np.ndarray],
    prompts: Sequence[Sequence[int]],
    stop_ids: set[int],
    seq_length: int,
    layout: ModelsRecipe,
) -> tuple[Fidelity, dict[str, list[list[int]]], dict[str, int]]:
    """Load and run the models: figures, continuations and parameter counts of each."""
    with platform.runtime(parallelism=layout.sizes):
        models = {m: load_model(folders[m], seq_length) for m in (TEACHER, BEFORE, AFTER)}
        functions = {name: partial(logits, model) for name, model in models.items()}
        fidelity = measure(
            functions[TEACHER],
            {name: functions[name] for name in (BEFORE, AFTER)},
            documents,
            seq_length,
            evaluation.micro_batch_size,
        )
        written = {}
        for name, function in functions.items():
            logger.info("writing %d continuations with the %s model", len(prompts), name)
            written[name] = continuations(
                function, prompts, evaluation.max_new_tokens, stop_ids, seq_length
            )
        parameters = {m: sum(p.numel() for p in model.parameters()) for m, model in models.items()}
    return fidelity, written, parameters


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
