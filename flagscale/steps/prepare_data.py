"""Step 1: documents -> a `dataset` artifact (Megatron indexed datasets and the tokenizer)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from flagscale import tracking
from flagscale.artifacts import new_artifact
from flagscale.data.chat import ChatEncoder
from flagscale.data.counts import Counts, add_up, check_splits, measure_epoch
from flagscale.data.document_tokens import DocumentTokens, find_document_tokens
from flagscale.data.encoder import Encoder
from flagscale.data.layout import SPLITS
from flagscale.data.sources import Document, documents
from flagscale.data.writer import Corpus, write_splits
from flagscale.errors import UserError
from flagscale.models.tokenizers import load_tokenizer, tokenizer_hash
from flagscale.recipe import DataRecipe
from flagscale.recipe.data import CorpusRecipe

logger = logging.getLogger(__name__)


def prepare_data(data: DataRecipe, output: Path) -> dict[str, float]:
    """Tokenise one or several corpora into train, validation and test splits.

    Args:
        data: the recipe's section, with `tokenizer` filled in.
        output: folder of the `dataset` artifact.

    Returns:
        `<split>_documents`, `_tokens`, `_characters` and `_sequences` (of `seq_length`, an epoch),
        `duplicate_documents` and `tokens_per_second` (reading included); where there are
        conversations also `<split>_learnt_tokens` and `_truncated`, `conversations_left_out` (they
        have no answer) and `conversations_with_control_tokens` (a message holds a special token's
        name).

    Raises:
        UserError: a corpus, the tokenizer or a split does not serve; nothing is left at `output`.
    """
    if data.tokenizer is None:
        raise UserError("data.tokenizer is not set; name the teacher's source")
    params = {"data": data.model_dump(mode="json")}
    with tracking.step_run("prepare-data", params) as run:
        tokenizer = load_tokenizer(data.tokenizer, data.tokenizer_revision)
        tokens = find_document_tokens(tokenizer, data.eod_token, data.bos_token)
        corpora = [_corpus(corpus, data, tokenizer, tokens) for corpus in data.corpora]
        start = time.monotonic()
        with new_artifact(output, "dataset", params, log=run.log_manifest) as staging:
            counts = write_splits(corpora, staging.path, data.workers)
            seconds = time.monotonic() - start
            facts = _facts(data, corpora, counts, tokens)
            check_splits(facts, data.validation_fraction, data.test_fraction)
            facts["epochs"] = {
                name: asdict(measure_epoch(staging.path, facts, name)) for name in SPLITS
            }
            tokenizer.save_pretrained(staging.path / "tokenizer")
            staging.tokenizer_hash = tokenizer_hash(tokenizer)
            staging.facts = facts
        _report(facts)
        metrics = _metrics(facts, seconds)
        run.log_metrics(metrics)
    return metrics


def _corpus(
    corpus: CorpusRecipe,
    data: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    tokens: DocumentTokens,
) -> Corpus:
    kind = "chat" if corpus.format == "chat" else "text"
    fractions = (data.validation_fraction, data.test_fraction)
    encode = (
        ChatEncoder(tokenizer, tokens.eod, *fractions)  # BOS is what its template writes
        if kind == "chat"
        else Encoder(tokenizer, tokens, *fractions)
    )
    if data.blend is None:
        return Corpus(None, kind, documents(corpus), encode)
    return Corpus(corpus.name, kind, _named(corpus), encode)


def _named(corpus: CorpusRecipe) -> Iterator[Document]:
    """Its documents; errors say which corpus of the blend they are about."""
    try:
        yield from documents(corpus)
    except UserError as error:
        raise UserError(f"data.blend, corpus {corpus.name!r}: {error}") from error


def _facts(
    data: DataRecipe, corpora: list[Corpus], counts: list[Counts], tokens: DocumentTokens
) -> dict[str, Any]:
    described = [
        {
            "name": corpus.name,
            "source": recipe.source,
            "kind": corpus.kind,
            "weight": recipe.weight,
            "control_tokens": getattr(corpus.encode, "control_tokens", 0),
            **asdict(found),
        }
        for corpus, recipe, found in zip(corpora, data.corpora, counts, strict=True)
    ]
    return {
        "source": data.source,
        "corpora": described,
        "splits": add_up(counts),
        "duplicate_documents": sum(found.duplicates for found in counts),
        "eod_id": tokens.eod,
        "bos_id": tokens.bos,
        "highest_id": max(found.highest_id for found in counts),
        "vocab_size": corpora[0].encode.vocab_size,
        "seq_length": data.seq_length,
    }


def _report(facts: dict[str, Any]) -> None:
    """Log what was found, and what a user may not expect."""
    for name, found in facts["splits"].items():
        logger.info(
            "%s: %d documents, %d tokens, %d characters",
            name,
            found["documents"],
            found["tokens"],
            found["characters"],
        )
    if facts["duplicate_documents"]:
        repeats = facts["duplicate_documents"]
        logger.info("%d documents repeat an earlier one; they were kept", repeats)
    truncated = sum(epoch["truncated"] for epoch in facts["epochs"].values())
    if truncated:
        limit = facts["seq_length"] + 1
        logger.warning("%d conversations lose what exceeds %d tokens", truncated, limit)
    for corpus in facts["corpora"]:
        name = corpus["name"] or corpus["source"]
        if corpus["left_out"]:
            logger.warning("%s: %d conversations without answer left out", name, corpus["left_out"])
        if corpus["control_tokens"]:
            logger.warning(
                "%s: messages of %d conversations hold a special token's name, which is encoded as "
                "that token",
                name,
                corpus["control_tokens"],
            )


def _metrics(facts: dict[str, Any], seconds: float) -> dict[str, float]:
    chats = [corpus for corpus in facts["corpora"] if corpus["kind"] == "chat"]
    metrics: dict[str, float] = {}
    for name, found in facts["splits"].items():
        counts = {**found, **facts["epochs"][name]}
        if not chats:  # nothing is masked or too long
            del counts["learnt_tokens"], counts["truncated"]
        metrics |= {f"{name}_{key}": float(value) for key, value in counts.items()}
    if chats:
        metrics["conversations_left_out"] = float(sum(c["left_out"] for c in chats))
        metrics["conversations_with_control_tokens"] = float(
            sum(c["control_tokens"] for c in chats)
        )
    metrics["duplicate_documents"] = float(facts["duplicate_documents"])
    tokens = sum(found["tokens"] for found in facts["splits"].values())
    metrics["tokens_per_second"] = tokens / max(seconds, 1e-9)
    return metrics
