"""Step 6: the distilled student -> an `export` artifact: a Hugging Face folder that is proven.

A student whose architecture no Hugging Face configuration holds is passed on as Megatron-Core's
distributed checkpoint instead (`export.format: megatron`).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from flagscale import tracking
from flagscale.artifacts import Manifest, new_artifact, open_artifact
from flagscale.errors import UserError
from flagscale.evaluation import METRICS
from flagscale.evaluation.card import model_card
from flagscale.megatron import platform
from flagscale.megatron.shape import MODEL_JSON, ModelShape
from flagscale.models.hf_export import (
    export_to_hf,
    reload_in_fresh_process,
    round_weights,
)
from flagscale.models.megatron import WEIGHTS, load_model, logits
from flagscale.models.origin import Origin
from flagscale.models.parity import (
    check_logits,
    check_weights,
    compare_logits,
    fixed_tokens,
)
from flagscale.models.source import load_tokenizer
from flagscale.recipe import ExportRecipe, ModelsRecipe

logger = logging.getLogger(__name__)

_PROMPT_TOKENS = 8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_student(
    export: ExportRecipe,
    distilled: Path,
    evaluation: Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
) -> dict[str, float]:
    """Write the student in the recipe's format, prove that it loads, and register it in MLflow.

    Args:
        export: the recipe's section.
        distilled: a `distilled-student` artifact.
        evaluation: the `evaluation` artifact of that student; its figures go into the model card.
        output: folder of the `export` artifact, which `AutoModelForCausalLM` loads; in the format
            `megatron` it holds `weights/`, `model.json` and `tokenizer/`.
        models: how the step is spread over processes.

    Returns:
        `bytes` of the weights; of a Hugging Face folder also `max_logit_difference` and
        `mean_logit_difference` between the Megatron-Core model and what transformers loads in a
        fresh process, and `top1_agreement`.

    Raises:
        UserError: the artifacts do not belong together, the format cannot hold the student, or the
            logits differ by more than `max_logit_difference`. Nothing is left at `output`.
        RuntimeError: transformers cannot load what was written.
    """
    parents = {
        "distilled": open_artifact(distilled, "distilled-student"),
        "evaluation": open_artifact(evaluation, "evaluation"),
    }
    metrics = _metrics_of(evaluation, parents)
    recipe = {"export": export.model_dump(mode="json")}
    if export.format == "huggingface":
        ModelShape.load(distilled).check_fits_hugging_face()
    with tracking.step_run("export-student", recipe, parents=parents) as run:
        with new_artifact(output, "export", recipe, parents, run.log_artifact) as staging:
            write = _copy_megatron if export.format == "megatron" else _export
            figures, facts = write(export, models, distilled, staging.path)
            card = model_card(
                export.registered_model_name or "Distilled student",
                Origin.load(distilled / "hf"),
                ModelShape.load(distilled),
                _sections(parents["distilled"]),
                metrics,
                export.format,
            )
            (staging.path / "README.md").write_text(card, encoding="utf-8")
            staging.facts = {**figures, **facts, "format": export.format}
            staging.tokenizer_hash = parents["distilled"].tokenizer_hash
        run.log_metrics(figures)
        if export.registered_model_name:
            uri = run.log_model(output, export.registered_model_name)
            if uri:
                logger.info("registered in MLflow as %s", uri)
    return figures


def _metrics_of(evaluation: Path, parents: dict[str, Manifest]) -> dict[str, Any]:
    """The evaluation's figures, which must be of this student."""
    measured = parents["evaluation"].parents.get("distilled")
    if measured != parents["distilled"].digest:
        raise UserError(
            f"{evaluation}: measured another student ({measured}) than the one to export "
            f"({parents['distilled'].digest}); give the artifacts of one run"
        )
    values: dict[str, Any] = json.loads((evaluation / METRICS).read_text(encoding="utf-8"))
    return values


def _export(
    export: ExportRecipe, models: ModelsRecipe, distilled: Path, folder: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Write the folder; compare what transformers makes of it with the model it came from.

    Returns:
        The figures, and what else the manifest says.
    """
    shape, template = ModelShape.load(distilled), distilled / "hf"
    dtype = _DTYPES[export.dtype]
    tokens = fixed_tokens(load_tokenizer(template), shape.max_position_embeddings)
    with platform.runtime(parallelism=models.sizes):
        model = load_model(distilled, tokens.size(1))
        check_weights(model, f"student {distilled}")
        export_to_hf(model, shape, template, folder, dtype)
        round_weights(model, dtype)
        expected_bsv = logits(model, tokens).cpu()
        del model
    reloaded = reload_in_fresh_process(folder, tokens, tokens[0, :_PROMPT_TOKENS].tolist())
    parity = compare_logits(expected_bsv, reloaded.logits_bsv)
    logger.info(
        "transformers loads the export: logits differ by at most %.3g over %d positions; it writes "
        "%r",
        parity.max_abs_difference,
        parity.num_tokens,
        reloaded.text,
    )
    check_logits(parity, export.max_logit_difference, "export.max_logit_difference")
    figures = {
        "max_logit_difference": parity.max_abs_difference,
        "mean_logit_difference": parity.mean_abs_difference,
        "top1_agreement": parity.top1_agreement,
        "bytes": _bytes(folder.glob("*.safetensors")),
    }
    return figures, {"dtype": export.dtype, "generated": reloaded.text}


def _copy_megatron(
    export: ExportRecipe, models: ModelsRecipe, distilled: Path, folder: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Pass the distributed checkpoint on, with what is needed to load it.

    Returns:
        The figures, and what else the manifest says.
    """
    del export  # the checkpoint is what it is
    shutil.copytree(distilled / WEIGHTS, folder / WEIGHTS)
    shutil.copy(distilled / MODEL_JSON, folder / MODEL_JSON)
    load_tokenizer(distilled / "hf").save_pretrained(folder / "tokenizer")
    with platform.runtime(parallelism=models.sizes):
        shape = ModelShape.load(folder)
        check_weights(load_model(folder, shape.max_position_embeddings), f"student {distilled}")
    return {"bytes": _bytes((folder / WEIGHTS).iterdir())}, {"dtype": "float32"}


def _bytes(files: Iterable[Path]) -> float:
    return float(sum(path.stat().st_size for path in files))


def _sections(distilled: Manifest) -> dict[str, dict[str, Any]]:
    return {name: distilled.recipe.get(name, {}) for name in ("distillation", "training")}
