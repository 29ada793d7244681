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

from flagscale.artifacts import Manifest, open_artifact, read_manifest
from flagscale.checkpoint.agreement import on_first_rank, same_outcome
from flagscale.checkpoint.stored import StoredTensors
from flagscale.errors import UserError
from flagscale.evaluation import LINEAGE, METRICS
from flagscale.evaluation.card import model_card
from flagscale.evaluation.figures import scalars
from flagscale.evaluation.pages.lineage import render as render_lineage
from flagscale.execution.launch import call_on_ranks, is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.shape import MODEL_JSON, QUANTIZERS, ModelShape
from flagscale.models.fresh_process import reload_in_fresh_process
from flagscale.models.hf_artifact import describe
from flagscale.models.hf_description import check_ids, write_tokenizer
from flagscale.models.hf_export import round_weights, write_weights
from flagscale.models.hf_quantized import Fp8Scales
from flagscale.models.hf_weights import WeightMap
from flagscale.models.megatron import WEIGHTS, load_model, logits
from flagscale.models.origin import Origin, copy_licenses, pretrained_origin
from flagscale.models.parity import (
    check_logits,
    check_weights,
    compare_logits,
    fixed_tokens,
)
from flagscale.models.probing_texts import probing_texts
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import ExportRecipe, ModelsRecipe
from flagscale.steps.on_ranks import tracked, written
from flagscale.steps.recording import register_export

logger = logging.getLogger(__name__)

_PROMPT_TOKENS = 8
_TOKENIZER = "tokenizer"  # folder of it beside Megatron-Core's weights
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_student(
    export: ExportRecipe,
    distilled: Path,
    evaluation: Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
    lineage: Path | None = None,
) -> dict[str, float]:
    """Write the student in the recipe's format, prove that it loads, and register it in MLflow.

    Args:
        export: the recipe's section.
        distilled: a `distilled-student` artifact.
        evaluation: the `evaluation` artifact of that student; its figures go into the model card.
        output: folder of the `export` artifact, which `AutoModelForCausalLM` loads; in the format
            `megatron` it holds `weights/`, `model.json` and `tokenizer/`.
        models: how the step is spread over processes.
        lineage: file for the page that says which data, teacher, code and recipe made it.

    Returns:
        `bytes` of the weights; of a Hugging Face folder also `max_logit_difference` and
        `mean_logit_difference` between the Megatron-Core model and what transformers loads in a
        fresh process, and `top1_agreement`.

    Raises:
        UserError: the artifacts do not belong together, the format cannot hold the student, or the
            logits differ by more than `max_logit_difference`. Nothing is left at `output`.
        RuntimeError: transformers cannot load what was written.
    """
    _metrics_of(evaluation, _parents(distilled, evaluation, check_files=False))
    if export.format == "huggingface":
        ModelShape.load(distilled).check_fits_hugging_face()
    figures = call_on_ranks(
        "export-student",
        export_on_rank,
        models.processes,
        export=export,
        distilled=distilled,
        evaluation=evaluation,
        output=output,
        models=models,
    )
    if lineage is not None:
        lineage.parent.mkdir(parents=True, exist_ok=True)
        lineage.write_text(render_lineage(read_manifest(output)), encoding="utf-8")
    return figures


def export_on_rank(
    export: ExportRecipe, distilled: Path, evaluation: Path, output: Path, models: ModelsRecipe
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `export_student`."""
    parents = _parents(distilled, evaluation, check_files=is_first_rank())
    recipe = {"export": export.model_dump(mode="json")}
    with tracked("export-student", recipe, parents=parents) as run:
        with (
            platform.runtime(parallelism=models.sizes),
            written(output, "export", recipe, parents, run) as staging,
        ):
            write = _copy_megatron if export.format == "megatron" else _export
            figures, facts = write(export, models, distilled, staging.path)
            if is_first_rank():
                card = model_card(
                    export.registered_model_name or "Distilled student",
                    Origin.load(distilled / "hf"),
                    ModelShape.load(distilled),
                    _sections(parents["distilled"]),
                    _metrics_of(evaluation, parents),
                    export.format,
                    has_chat_template=any(staging.path.rglob("*.jinja")),
                    pretrained=pretrained_origin(distilled / "hf"),
                )
                (staging.path / "README.md").write_text(card, encoding="utf-8")
            staging.facts = {**figures, **facts, "format": export.format}
            staging.tokenizer_hash = parents["distilled"].tokenizer_hash
        run.log_metrics(figures)
        if is_first_rank():
            run.log_text(render_lineage(read_manifest(output)), LINEAGE)
        if export.registered_model_name and is_first_rank():
            assert staging.manifest is not None
            register_export(
                run,
                export.registered_model_name,
                output,
                staging.manifest,
                int(parents["distilled"].facts["steps"]),
                scalars(_metrics_of(evaluation, parents)),
                parents["evaluation"].parents["dataset"],
            )
    return figures


def _parents(distilled: Path, evaluation: Path, *, check_files: bool) -> dict[str, Manifest]:
    return {
        "distilled": open_artifact(distilled, "distilled-student", check_files),
        "evaluation": open_artifact(evaluation, "evaluation", check_files),
    }


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
) -> tuple[dict[str, float], dict[str, Any]]:
    """Write the folder; compare what transformers makes of it with the model it came from.

    Returns:
        The figures, and what else the manifest says.
    """
    shape, template = ModelShape.load(distilled), distilled / "hf"
    dtype = _DTYPES[export.dtype]
    stored = StoredTensors(distilled / WEIGHTS)
    with same_outcome(folder, "could not be exported"):
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        scales = Fp8Scales(distilled) if shape.quantization is not None else None
        write_weights(stored, WeightMap(shape), folder, dtype, rank, world_size, scales)
        tokenizer = load_tokenizer(template)
        if rank == 0:
            describe(template, tokenizer, folder, dtype, is_quantized=scales is not None)
    tokens = fixed_tokens(tokenizer, shape.max_position_embeddings)
    computed_in = platform.inference_dtype(dtype)
    model = load_model(distilled, tokens.size(1), models.sizes, computed_in)
    with same_outcome(folder, "could not be exported"):
        check_weights(model, f"student {distilled}")
    round_weights(model, dtype)
    ours_bsv = logits(model, tokens).cpu()
    del model  # before transformers' comes

    def prove() -> tuple[dict[str, float], str | None]:
        prompt = tokens[0, :_PROMPT_TOKENS].tolist()
        reloaded = reload_in_fresh_process(folder, tokens, prompt, probing_texts())
        check_ids(tokenizer, probing_texts(), reloaded.ids, f"exported {folder}")
        parity = compare_logits(ours_bsv, reloaded.logits_bsv, computed_in)
        logger.info(
            "transformers loads the export: logits differ by at most %.3g over %d positions; it "
            "writes %r",
            *(parity.max_logit_difference, parity.num_tokens, reloaded.text),
        )
        check_logits(parity, export.max_logit_difference, "export.max_logit_difference")
        return parity.figures(), reloaded.text

    figures, text = on_first_rank(folder, "could not be proven", prove)
    figures["bytes"] = _bytes(folder.glob("*.safetensors"))
    return figures, {"dtype": export.dtype, "generated": text}


def _copy_megatron(
    export: ExportRecipe, models: ModelsRecipe, distilled: Path, folder: Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """Pass the distributed checkpoint on, with what is needed to load it.

    Returns:
        The figures, and what else the manifest says.
    """
    del export  # the checkpoint is what it is

    def copy() -> None:
        shutil.copytree(distilled / WEIGHTS, folder / WEIGHTS)
        shutil.copy(distilled / MODEL_JSON, folder / MODEL_JSON)
        if (distilled / QUANTIZERS).exists():
            shutil.copy(distilled / QUANTIZERS, folder / QUANTIZERS)
        (folder / _TOKENIZER).mkdir()
        write_tokenizer(load_tokenizer(distilled / "hf"), folder / _TOKENIZER)
        copy_licenses(distilled / "hf", folder)

    on_first_rank(folder, "could not be copied", copy)
    shape, stored = ModelShape.load(folder), StoredTensors(folder / WEIGHTS)
    dtype = next(iter(stored.tensors.values())).dtype
    model = load_model(folder, shape.max_position_embeddings, models.sizes, dtype)
    with same_outcome(folder, "could not be exported"):
        check_weights(model, f"student {distilled}")
    name = str(dtype).removeprefix("torch.")
    return {"bytes": _bytes((folder / WEIGHTS).iterdir())}, {"dtype": name}


def _bytes(files: Iterable[Path]) -> float:
    return float(sum(path.stat().st_size for path in files))


def _sections(distilled: Manifest) -> dict[str, dict[str, Any]]:
    return {name: distilled.recipe.get(name, {}) for name in ("distillation", "training")}
