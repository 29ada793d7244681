"""What `evaluate` makes of what it has measured: the figures, and the report with its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.artifacts import Manifest, write_json
from flagscale.checkpoint import count_parameters
from flagscale.data.loader import token_counts
from flagscale.evaluation import METRICS, PER_DOCUMENT, REPORT, REPORT_DATA, SUMMARY
from flagscale.evaluation.fidelity import TEACHER, Fidelity
from flagscale.evaluation.figures import AFTER, BEFORE, summarise
from flagscale.evaluation.forecast.section import told
from flagscale.evaluation.report.costs import Costs
from flagscale.evaluation.report.data import ReportData
from flagscale.evaluation.report.page import render
from flagscale.evaluation.report.summary import summary_markdown
from flagscale.evaluation.report.token_analysis import Draws, find
from flagscale.evaluation.report.token_findings import TokenFindings, TokenTable
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import WEIGHTS
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import EvaluationRecipe
from flagscale.sizes.work import forward_flops, training_flops

FILES = (REPORT, REPORT_DATA, SUMMARY, METRICS, PER_DOCUMENT)
MODELS = (TEACHER, BEFORE, AFTER)
_LOGS = ("training", "validation")
_BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Measured:
    """What running the models gave.

    Attributes:
        fidelity: sums per document.
        tokens: every predicted token.
        documents: token ids of each, as they were measured.
        texts: model -> the new tokens of each continuation.
    """

    fidelity: Fidelity
    tokens: TokenTable
    documents: Sequence[np.ndarray]
    texts: Mapping[str, Sequence[list[int]]]


def token_table(
    documents: Sequence[np.ndarray], seq_length: int, tokens: Mapping[str, np.ndarray]
) -> TokenTable:
    """The tokens of `measure_closely`, with where they stand.

    Args:
        documents: token ids of each.
        seq_length: of a window.
        tokens: student -> KL and `DETAILS` [6, n].
    """
    entropy_n, confidence_n, _, guess_n, _ = tokens[AFTER][1:]
    return TokenTable(
        document_n=np.repeat(np.arange(len(documents)), [len(one) - 1 for one in documents]),
        position_n=np.concatenate([np.arange(len(one) - 1) % seq_length + 1 for one in documents]),
        label_n=np.concatenate([one[1:] for one in documents]).astype(np.int64),
        teacher_entropy_n=entropy_n,
        teacher_confidence_n=confidence_n,
        teacher_guess_n=guess_n.astype(np.int64),
        kl_n={name: values[0] for name, values in tokens.items()},
        confidence_n={name: values[3] for name, values in tokens.items()},
        guess_n={name: values[5].astype(np.int64) for name, values in tokens.items()},
    )


def report_data(
    evaluation: EvaluationRecipe,
    folders: Mapping[str, Path],
    parents: Mapping[str, Manifest],
    measured: Measured,
) -> ReportData:
    """Figures, intervals and findings.

    Args:
        evaluation: the recipe's section.
        folders: of the artifacts by name.
        parents: their manifests.
        measured: of the models.
    """
    facts = parents["dataset"].facts
    findings = _findings(evaluation, folders["dataset"], facts, measured)
    parameters = {name: count_parameters(folders[name] / WEIGHTS) for name in MODELS}
    training, validation = (_read_log(folders[AFTER] / f"{name}.jsonl") for name in _LOGS)
    metrics = {
        **summarise(
            measured.fidelity, evaluation.bootstrap_samples, evaluation.confidence, _BOOTSTRAP_SEED
        ),
        "calibration": {
            model: {"ece": one.ece, "overconfidence": one.overconfidence}
            for model, one in findings.calibration.items()
        },
        "seq_length": int(facts["seq_length"]),
        "kinds": sorted({corpus["kind"] for corpus in facts["corpora"]}),
        "parameters": parameters,
        "forecasts": told(training, validation),
    }
    return ReportData(
        metrics=metrics,
        fidelity=measured.fidelity,
        training=training,
        validation=validation,
        generations=_generations(evaluation, folders["dataset"], measured.texts),
        layers={name: ModelShape.load(folders[name]).num_layers for name in MODELS},
        parameters=parameters,
        manifests=parents,
        evaluation=evaluation.model_dump(mode="json"),
        findings=findings,
        costs=_costs(evaluation, folders, parents, training),
    )


def what_was_measured(manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """What the student is and how it was trained: by it a sweep knows which variant this is."""
    return {
        "recipe": manifests[BEFORE].recipe | manifests[AFTER].recipe,
        "training": {
            name: value for name, value in manifests[AFTER].facts.items() if name != "seq_length"
        },
    }


def write(folder: Path, data: ReportData) -> None:
    """The files of the artifact."""
    write_json(folder / METRICS, data.metrics)
    with (folder / PER_DOCUMENT).open("w", encoding="utf-8") as stream:
        for row in data.fidelity.rows():
            stream.write(json.dumps(row) + "\n")
    data.save(folder)
    (folder / REPORT).write_text(render(data), encoding="utf-8")
    (folder / SUMMARY).write_text(summary_markdown(data), encoding="utf-8")


def _findings(
    evaluation: EvaluationRecipe, dataset: Path, facts: Mapping[str, Any], measured: Measured
) -> TokenFindings:
    tokenizer = load_tokenizer(dataset / "tokenizer")
    draws = Draws(
        len(measured.documents),
        evaluation.bootstrap_samples,
        evaluation.confidence,
        _BOOTSTRAP_SEED,
    )
    trained_v = token_counts(dataset, "train", int(facts["vocab_size"]))

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids)))

    return find(measured.tokens, draws, trained_v, measured.documents, decode)


def _generations(
    evaluation: EvaluationRecipe, dataset: Path, texts: Mapping[str, Sequence[list[int]]]
) -> list[dict[str, str]]:
    """Each prompt with the models' continuations."""
    tokenizer = load_tokenizer(dataset / "tokenizer")
    return [
        {"prompt": prompt} | {name: str(tokenizer.decode(new[i])) for name, new in texts.items()}
        for i, prompt in enumerate(evaluation.prompts)
    ]


def _costs(
    evaluation: EvaluationRecipe,
    folders: Mapping[str, Path],
    parents: Mapping[str, Manifest],
    training: Sequence[Mapping[str, float]],
) -> Costs | None:
    """None of a student that was not trained."""
    recipe, seq_length = parents[AFTER].recipe, int(parents["dataset"].facts["seq_length"])
    if not training or "distillation" not in recipe:
        return None
    shapes = {name: ModelShape.load(folders[name]) for name in MODELS}
    runs_teacher = (
        recipe["distillation"]["loss"] != "none" and "teacher-outputs" not in parents[AFTER].parents
    )
    a_step = recipe["training"]["global_batch_size"] * seq_length
    seconds = sum(a_step / row["tokens per second"] for row in training)
    held = parents[AFTER].peak_memory
    return Costs(
        tokens=a_step * len(training),
        seconds=seconds,
        processes=len(held.get("host", ())),
        device="cuda" if "device" in held else "cpu",
        flops=training_flops(
            shapes[AFTER],
            shapes[TEACHER] if runs_teacher else None,
            a_step * len(training),
            seq_length,
            recipe["training"].get("recompute_granularity") or "none",
        ),
        peak_memory={kind: max(values) for kind, values in held.items()},
        weight_bytes={name: _size(folders[name] / WEIGHTS) for name in MODELS},
        energy_joules=_joules(parents[AFTER]),
        energy_from=parents[AFTER].energy.get("from", ""),
        price=_price(evaluation, seconds),
        flops_a_token={name: forward_flops(shapes[name], 1, seq_length) for name in MODELS},
    )


def _joules(manifest: Manifest) -> float | None:
    return float(sum(manifest.energy["joules"])) if "joules" in manifest.energy else None


def _price(evaluation: EvaluationRecipe, seconds: float) -> float | None:
    an_hour = evaluation.price_per_hour
    return None if an_hour is None else an_hour * seconds / 3600


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _read_log(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
