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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint import save_weights
from flagscale.checkpoint.agreement import same_outcome
from flagscale.data.loader import split_documents
from flagscale.errors import UserError
from flagscale.evaluation.fidelity import FIGURES, Fidelity, document_hash
from flagscale.evaluation.measure.measuring import keep, measure
from flagscale.evaluation.measure.teacher import KeptTeacher
from flagscale.evaluation.measure.windows import Batch, batches
from flagscale.evaluation.quantized import (
    DECISIVE,
    QUANTIZED,
    UNQUANTIZED,
    cost_of_quantization,
)
from flagscale.execution.launch import is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.quantized import check_quantized
from flagscale.megatron.shape import ModelShape
from flagscale.models.causal_lm import CausalLM, is_first_replica
from flagscale.models.megatron import (
    WEIGHTS,
    forward,
    from_last_stage,
    hidden_states,
    load_model,
)
from flagscale.recipe import ParallelismRecipe, QuantizationRecipe
from flagscale.recipe.quantized_training import check_quantized_on_cpu

logger = logging.getLogger(__name__)


def check_quantization(
    shape: ModelShape, quantization: QuantizationRecipe, sizes: ParallelismRecipe
) -> None:
    """Refuse what cannot be quantised so, or not on this machine, before long work.

    Args:
        shape: of the student.
        quantization: the recipe's section.
        sizes: of the process groups of the model steps.

    Raises:
        UserError: what does not fit.
    """
    check_quantized(shape, quantization.recipe, sizes, calibrates=True)
    if not platform.HAS_GPU:
        try:
            check_quantized_on_cpu(quantization)
        except ValueError as error:
            raise UserError(str(error)) from error


def quantize(
    quantization: QuantizationRecipe,
    inputs: tuple[Path, Path],
    args: Arguments,
    stored: torch.dtype,
    folder: Path,
    batch: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Quantise the student after training, and measure what it costs. All ranks call it.

    Args:
        quantization: the recipe's section.
        inputs: the `teacher` and the `dataset` artifact.
        args: that the student was built with.
        stored: dtype of the student's weights on disk.
        folder: of the student's artifact; becomes the quantised one's.
        batch: whose `tokens` the quantised student predicts.

    Returns:
        For the manifest the recipe, what it was calibrated on, what it costs, and whether the
        student is to be trained; and this rank's part of what it predicts (see `forward`).

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
    layout = (args.seq_length, args.parallelism, args.params_dtype)
    keep(_causal_lm(load_model(teacher, *layout)), kept, text)
    gc.collect()  # modules refer to each other: the teacher goes only now
    torch.distributed.barrier()
    model = load_model(folder, *layout)
    sums = {UNQUANTIZED: _sums(UNQUANTIZED, model, kept, text, len(documents))}
    samples = _calibration(dataset, quantization.calibration_tokens, args.seq_length)

    def run(one: GPTModel) -> None:
        for sample in samples:
            hidden_states(one, sample.inputs_bs)

    calibrate(model, quantization.recipe, run, stored)
    sums[QUANTIZED] = _sums(QUANTIZED, model, kept, text, len(documents))
    _save(model, quantization.recipe, stored, folder, save_quantizers)
    cost = cost_of_quantization(
        Fidelity(
            documents=tuple(document_hash(document) for document in documents),
            tokens_d=np.array([len(document) - 1 for document in documents], dtype=np.int64),
            sums=sums,
        )
    )
    trains = quantization.when == "always" or cost["significant"]
    _tell(quantization, cost, trains)
    facts = {
        "recipe": quantization.recipe,
        "calibration_tokens": sum(sum(sample.lengths) for sample in samples),
        "calibration_digest": _digest(samples),
        "cost": cost,
        "trains": trains,
    }
    return facts, forward(model, batch["tokens"])


def _save(
    model: GPTModel,
    quantization: str,
    stored: torch.dtype,
    folder: Path,
    save_quantizers: Callable[[GPTModel, str, Path], None],
) -> None:
    """What has changed of the artifact. The weights have where they were divided by scales."""
    save_quantizers(model, quantization, folder)
    torch.distributed.barrier()  # nobody reads the teacher's states any more
    with same_outcome(folder, "could not be written"):
        if is_first_rank():
            shutil.rmtree(folder / "teacher-states")
            shutil.rmtree(folder / WEIGHTS)
            replace(ModelShape.load(folder), quantization=quantization).save(folder)
    save_weights(model, folder / WEIGHTS, stored)


def quantization_figures(facts: dict[str, Any]) -> dict[str, float]:
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
