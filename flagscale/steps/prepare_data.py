"""Step 1: documents -> a `dataset` artifact (Megatron indexed datasets and the tokenizer)."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path

from flagscale import tracking
from flagscale.artifacts import new_artifact
from flagscale.data.encoder import Encoder, find_eod
from flagscale.data.sources import documents
from flagscale.data.writer import Counts, check_counts, write_splits
from flagscale.errors import UserError
from flagscale.models.source import load_tokenizer, tokenizer_hash
from flagscale.recipe import DataRecipe

logger = logging.getLogger(__name__)


def prepare_data(data: DataRecipe, output: Path) -> dict[str, float]:
    """Tokenise a corpus into train, validation and test splits.

    Args:
        data: the recipe's section, with `tokenizer` filled in.
        output: folder of the `dataset` artifact.

    Returns:
        `<split>_documents`, `_tokens`, `_characters` and `_sequences` (of `seq_length`, an epoch),
        `duplicate_documents` and `tokens_per_second` (reading included).

    Raises:
        UserError: the corpus, the tokenizer or a split does not serve; nothing is left at `output`.
    """
    if data.tokenizer is None:
        raise UserError("data.tokenizer is not set; name the teacher's source")
    params = {"data": data.model_dump(mode="json")}
    with tracking.step_run("prepare-data", params) as run:
        tokenizer = load_tokenizer(data.tokenizer, data.tokenizer_revision)
        eod_id = find_eod(tokenizer, data.eod_token)
        encoder = Encoder(tokenizer, eod_id, data.validation_fraction, data.test_fraction)
        start = time.monotonic()
        with new_artifact(output, "dataset", params, log=run.log_artifact) as staging:
            counts = write_splits(documents(data), encoder, staging.path, data.workers)
            check_counts(counts, data.seq_length, data.validation_fraction, data.test_fraction)
            tokenizer.save_pretrained(staging.path / "tokenizer")
            staging.tokenizer_hash = tokenizer_hash(tokenizer)
            staging.facts = {
                "source": data.source,
                "splits": {name: asdict(found) for name, found in counts.splits.items()},
                "duplicate_documents": counts.duplicates,
                "eod_id": eod_id,
                "vocab_size": encoder.vocab_size,
                "seq_length": data.seq_length,
            }
        metrics = _metrics(counts, data.seq_length, time.monotonic() - start)
        run.log_metrics(metrics)
    return metrics


def _metrics(counts: Counts, seq_length: int, seconds: float) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, found in counts.splits.items():
        metrics |= {f"{name}_{key}": float(value) for key, value in asdict(found).items()}
        metrics[f"{name}_sequences"] = float((found.tokens - 1) // seq_length)
        logger.info(
            "%s: %d documents, %d tokens, %d characters",
            name,
            found.documents,
            found.tokens,
            found.characters,
        )
    if counts.duplicates:
        logger.info("%d documents repeat an earlier one; they were kept", counts.duplicates)
    metrics["duplicate_documents"] = float(counts.duplicates)
    metrics["tokens_per_second"] = counts.tokens / max(seconds, 1e-9)
    return metrics
