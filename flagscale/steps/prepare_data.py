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
from flagscale.data.chat_counts import told, total
from flagscale.data.counts import Counts, add_up, check_splits, measure_epoch
from flagscale.data.document_tokens import DocumentTokens, find_document_tokens
from flagscale.data.encoder import Encode, Encoder
from flagscale.data.layout import SPLITS
from flagscale.data.rows import BadRows
from flagscale.data.sources import Document, documents
from flagscale.data.states import is_remote, remote_state
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
        `bad_rows` (left out), `duplicate_documents` and `tokens_per_second` (reading included);
        where there are conversations also `<split>_learnt_tokens` and `_truncated`, and
        `conversations_NAME` for each number of `ChatCounts`.

    Raises:
        UserError: a corpus, the tokenizer or a split does not serve; nothing is left at `output`.
    """
    if data.tokenizer is None:
        raise UserError("data.tokenizer is not set; name the teacher's source")
    params = {"data": data.model_dump(mode="json")}
    with tracking.step_run("prepare-data", params) as run:
        tokenizer = load_tokenizer(data.tokenizer, data.tokenizer_revision)
        if data.chat_template is not None:  # the student's too: it lies in the artifact
            tokenizer.chat_template = data.chat_template
        tokens = find_document_tokens(tokenizer, data.eod_token, data.bos_token)
        states = [_state(corpus, data) for corpus in data.corpora]
        corpora = [_corpus(corpus, data, tokenizer, tokens) for corpus in data.corpora]
        start = time.monotonic()
        with new_artifact(output, "dataset", params, log=run.log_manifest) as staging:
            counts = write_splits(corpora, staging.path, data.workers)
            seconds = time.monotonic() - start
            facts = _facts(data, corpora, counts, tokens)
            for corpus, state in zip(facts["corpora"], states, strict=True):
                corpus["state"] = state
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
        if staging.manifest is not None:
            splits = [tracking.Split.of(staging.manifest, name) for name in SPLITS]
            run.log_inputs(splits, [f"prepared for {name}" for name in SPLITS])
    return metrics


def _state(corpus: CorpusRecipe, data: DataRecipe) -> str | None:
    """What a remote source holds, as far as it says."""
    if not is_remote(corpus):
        return None
    state = remote_state(corpus)
    if data.fingerprint is None and corpus.revision is None:
        logger.warning(
            "%s: read as it is now (%s). KFP's cache knows it by its address alone: for a run that "
            "is to see a change give another data.fingerprint, or --no-cache",
            corpus.source,
            state or "nobody says what state that is",
        )
    return state


def _corpus(
    corpus: CorpusRecipe,
    data: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    tokens: DocumentTokens,
) -> Corpus:
    fractions = (data.validation_fraction, data.test_fraction)
    encode: Encode
    if corpus.format == "chat":
        kind = "chat"
        encode = ChatEncoder(
            tokenizer,
            tokens.eod,  # BOS is what its template writes
            *fractions,
            seq_length=data.seq_length,
            arguments=data.chat_template_kwargs,
            last_only=data.train_on == "last",
        )
        if encode.template.tells_the_date:
            logger.warning(
                "the chat template writes today's date, so the tokens depend on the day; to choose "
                "one, set the template's variable in data.chat_template_kwargs (date_string)"
            )
    else:
        kind = "text"
        encode = Encoder(tokenizer, tokens, *fractions)
    bad_rows = BadRows(corpus.max_bad_rows)
    if data.blend is None:
        return Corpus(None, kind, documents(corpus, bad_rows), encode, bad_rows)
    return Corpus(corpus.name, kind, _named(corpus, bad_rows), encode, bad_rows)


def _named(corpus: CorpusRecipe, bad_rows: BadRows) -> Iterator[Document]:
    """Its documents; errors say which corpus of the blend they are about."""
    try:
        yield from documents(corpus, bad_rows)
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
            **_of_chat(corpus.encode),
            **corpus.bad_rows.facts(),
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


def _of_chat(encode: Encode) -> dict[str, Any]:
    if not isinstance(encode, ChatEncoder):
        return {}
    return {"chat": asdict(encode.counts), "end_ids": sorted(encode.end_ids)}


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
    for corpus in facts["corpora"]:
        name = corpus["name"] or corpus["source"]
        if corpus["bad_rows"]:
            logger.warning("%s: %d rows that cannot be used left out", name, corpus["bad_rows"])
        for line in told(corpus.get("chat"), facts["seq_length"]):
            logger.warning("%s: %s", name, line)


def _metrics(facts: dict[str, Any], seconds: float) -> dict[str, float]:
    chats = [corpus for corpus in facts["corpora"] if corpus["kind"] == "chat"]
    metrics: dict[str, float] = {}
    for name, found in facts["splits"].items():
        counts = {**found, **facts["epochs"][name]}
        if not chats:  # nothing is masked or too long
            del counts["learnt_tokens"], counts["truncated"]
        metrics |= {f"{name}_{key}": float(value) for key, value in counts.items()}
    if chats:
        metrics |= {
            f"conversations_{key}": float(value)
            for key, value in asdict(total(corpus["chat"] for corpus in chats)).items()
        }
    metrics["bad_rows"] = float(sum(corpus["bad_rows"] for corpus in facts["corpora"]))
    metrics["duplicate_documents"] = float(facts["duplicate_documents"])
    tokens = sum(found["tokens"] for found in facts["splits"].values())
    metrics["tokens_per_second"] = tokens / max(seconds, 1e-9)
    return metrics
