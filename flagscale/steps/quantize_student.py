"""Part of convert-student: the student quantised after training, and what that alone costs.

The unquantised and the quantised student are measured on the same validation documents. Where the
recipe asks for it (`student.quantization.when: significant`), the student is trained only if the
difference is significant.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from flagscale.data.loader import split_documents
from flagscale.evaluation.fidelity import FIGURES, Fidelity, document_hash
from flagscale.evaluation.measuring import keep, measure
from flagscale.evaluation.quantized import (
    DECISIVE,
    QUANTIZED,
    UNQUANTIZED,
    cost_of_quantization,
)
from flagscale.evaluation.teacher import KeptTeacher
from flagscale.evaluation.windows import Batch, batches
from flagscale.execution.launch import is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.models.causal_lm import CausalLM, is_first_replica
from flagscale.models.megatron import from_last_stage, hidden_states, load_model
from flagscale.recipe import QuantizationRecipe

logger = logging.getLogger(__name__)


def quantize(
    model: GPTModel,
    quantization: QuantizationRecipe,
    stored: torch.dtype,
    inputs: tuple[Path, Path],
    args: Arguments,
    folder: Path,
) -> dict[str, Any]:
    """Quantise the student after training, and measure what it costs. All ranks call it.

    Args:
        model: this rank's part of the student; in place.
        quantization: the recipe's section.
        stored: dtype of the student's weights on disk.
        inputs: the `teacher` and the `dataset` artifact.
        args: that the student was built with.
        folder: of the student's artifact; gets `quantizers.safetensors`.

    Returns:
        For the manifest: the recipe, what it was calibrated on, what it costs, and whether the
        student is to be trained.

    Raises:
        UserError: fewer than two validation documents.
    """
    # ModelOpt is heavy, and most students are not quantised.
    from flagscale.post_training.quantization import calibrate
    from flagscale.post_training.quantizers import save_quantizers

    teacher, dataset = inputs
    kept_in = folder / "teacher-states"  # where all ranks can read
    kept = KeptTeacher(kept_in, writes=is_first_replica())
    if is_first_rank():
        kept_in.mkdir()
    torch.distributed.barrier()
    documents = _heads(
        split_documents(dataset, "validation", quantization.documents), args.seq_length
    )
    text = batches(documents, args.seq_length, args.micro_batch_size)
    keep(
        _causal_lm(load_model(teacher, args.seq_length, args.parallelism, args.params_dtype)),
        kept,
        text,
    )
    gc.collect()  # modules refer to each other: the teacher goes only now
    torch.distributed.barrier()
    sums = {UNQUANTIZED: _sums(UNQUANTIZED, model, kept, text, len(documents))}
    samples = _calibration(dataset, quantization.calibration_tokens, args.seq_length)

    def run(one: GPTModel) -> None:
        for sample in samples:
            hidden_states(one, sample.inputs_bs)

    calibrate(model, quantization.recipe, run, stored)
    save_quantizers(model, quantization.recipe, folder)
    sums[QUANTIZED] = _sums(QUANTIZED, model, kept, text, len(documents))
    torch.distributed.barrier()
    if is_first_rank():
        shutil.rmtree(kept_in)
    cost = cost_of_quantization(
        Fidelity(
            documents=tuple(document_hash(document) for document in documents),
            tokens_d=np.array([len(document) - 1 for document in documents], dtype=np.int64),
            sums=sums,
        )
    )
    trains = quantization.when == "always" or cost["significant"]
    _tell(quantization, cost, trains)
    return {
        "recipe": quantization.recipe,
        "calibration_tokens": sum(sum(sample.lengths) for sample in samples),
        "calibration_digest": _digest(samples),
        "cost": cost,
        "trains": trains,
    }


def figures(facts: dict[str, Any]) -> dict[str, float]:
    """What of it goes to MLflow as metrics."""
    models, paired = facts["cost"]["models"], facts["cost"]["paired"]
    found = {f"ptq {f} change": paired[f]["value"] for f in FIGURES}
    found |= {f"ptq {DECISIVE} change {end}": paired[DECISIVE][end] for end in ("low", "high")}
    found |= {f"{model} {f}": models[model][f]["value"] for model in models for f in FIGURES}
    return found | {"ptq is significant": float(facts["cost"]["significant"])}


def _causal_lm(model: GPTModel) -> CausalLM:
    return CausalLM(model, can_cache=False)


def _sums(
    name: str, model: GPTModel, teacher: KeptTeacher, text: Sequence[Batch], documents: int
) -> dict[str, np.ndarray]:
    """Figure -> sum per document, the same on every rank."""
    sums_mfd = torch.from_numpy(measure(name, _causal_lm(model), teacher, text, documents))
    sums_mfd = from_last_stage(sums_mfd.to(platform.device())).cpu()
    return dict(zip(FIGURES, sums_mfd[1].numpy(), strict=True))


def _heads(documents: Sequence[np.ndarray], seq_length: int) -> list[np.ndarray]:
    """Their starts; what has no token to predict is left out."""
    return [document[: seq_length + 1] for document in documents if len(document) > 1]


def _calibration(dataset: Path, tokens: int, seq_length: int) -> list[Batch]:
    """Windows of the train split with so many tokens, or all that it has; nothing is padded."""
    every = split_documents(dataset, "train")
    count = min(len(every), -(-tokens // seq_length))
    while True:
        chosen = [every[i * len(every) // count] for i in range(count)]
        enough = sum(min(len(document) - 1, seq_length) for document in chosen) >= tokens
        if enough or count == len(every):
            break
        count = min(2 * count, len(every))
    found, left = [], tokens
    for document in _heads(chosen, seq_length) if enough else chosen:
        if left > 0 and len(document) > 1:
            found.append(document[: left + 1])
            left -= len(found[-1]) - 1
    return batches(found, seq_length, 1)


def _digest(samples: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample[0].tokens.astype("<i8").tobytes())
    return f"sha256:{digest.hexdigest()}"


def _tell(quantization: QuantizationRecipe, cost: dict[str, Any], trains: bool) -> None:
    if not is_first_rank():
        return
    change, kl = cost["paired"][DECISIVE], cost["paired"]["kl"]
    logger.info(
        "quantised by %s, without training: LM loss %+.4f nats a token [%.4f, %.4f], KL to the "
        "teacher %+.4f [%.4f, %.4f] on %d validation documents; that is %ssignificant%s",
        quantization.recipe,
        *(change[key] for key in ("value", "low", "high")),
        *(kl[key] for key in ("value", "low", "high")),
        cost["documents"],
        "" if cost["significant"] else "not ",
        "" if trains else ": the student will not be trained",
    )
