"""The tokenizer that belongs to a model, giving the ids that the model was trained on.

Of a folder or a Hugging Face id, `tokenizer.json` is the truth: transformers' `AutoTokenizer`
builds some tokenizers from their class and takes no more than the vocabulary from it. Of a GGUF
file it is what `flagscale.models.gguf_tokenizer` makes of its metadata.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_tokenizers import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from transformers.utils.hub import cached_file

from flagscale.artifacts import digest
from flagscale.errors import UserError
from flagscale.imports import uncollected
from flagscale.models.location import Location, attempt, locate, read
from flagscale.models.probing_texts import probing_texts

logger = logging.getLogger(__name__)


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer that belongs to a model.

    Args:
        source: see `locate`.
        revision: see there.

    Raises:
        UserError: there is none, it cannot be read, or it would not give the model's own ids.
    """
    place = locate(source, revision)
    with uncollected():  # transformers imports most of itself only now
        if "gguf_file" in place.options:
            from flagscale.models.gguf_tokenizer import read_gguf_tokenizer

            path = Path(place.name) / place.options["gguf_file"]
            loaded = attempt(lambda: read_gguf_tokenizer(path), source, "tokenizer", place)
            assert isinstance(loaded, PreTrainedTokenizerFast)
            return loaded
        return _from_tokenizer_json(source, place)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identity of what a tokenizer does: vocabulary, merges, pre-processing and special tokens.

    Unlike a hash of its files it does not change with the place it was loaded from.
    """
    return digest({"pipeline": _pipeline(tokenizer), "special": tokenizer.special_tokens_map})


def pipeline_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identity of the ids that texts get, whatever EOS and the other special tokens are."""
    return digest(_pipeline(tokenizer))


def _pipeline(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    pipeline: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for transient in ("truncation", "padding", "version"):
        pipeline.pop(transient, None)
    return pipeline


def _from_tokenizer_json(source: str | Path, place: Location) -> PreTrainedTokenizerFast:
    def find() -> str | None:
        # It answers None only where the place is there and the file is not.
        return cached_file(
            place.name, TOKENIZER_FILE, **place.options, _raise_exceptions_for_missing_entries=False
        )

    path = attempt(find, source, "tokenizer", place)
    if path is None:
        raise UserError(
            f"tokenizer of {source}: {TOKENIZER_FILE} is missing. What transformers would make of "
            "tokenizer.model, tekken.json or vocab.json without it cannot be checked; write one "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...), and compare its ids "
            "with those of the model's authors"
        )

    def parse() -> Tokenizer:
        try:
            return Tokenizer.from_file(path)
        except Exception as error:  # the library raises no other type
            raise ValueError(f"{TOKENIZER_FILE}: {error}") from error

    own = attempt(parse, source, "tokenizer", place)
    loaded = read(PreTrainedTokenizerFast, source, "tokenizer", place)
    _restore(loaded, own, source)
    _check_prefix_space(loaded, own, source)
    _check_ids(loaded.backend_tokenizer, own, source)
    return loaded


def _restore(loaded: PreTrainedTokenizerFast, own: Tokenizer, source: str | Path) -> None:
    """Undo what transformers did to the pipeline because of `tokenizer_config.json`.

    It adds the tokens that only stand there. Special ones may stay (a pad token, for example):
    their names in a text are text. It also changes how those of `tokenizer.json` match, and which
    are put around a text.
    """
    for identifier, token in loaded.init_kwargs.get("added_tokens_decoder", {}).items():
        actual = loaded.convert_tokens_to_ids(str(token))
        if actual != identifier:
            raise UserError(
                f"tokenizer of {source}: {str(token)!r} is {identifier} in {TOKENIZER_CONFIG_FILE} "
                f"and {actual} by {TOKENIZER_FILE}; make the two agree on what the model knows"
            )
    backend = loaded.backend_tokenizer
    backend.post_processor = own.post_processor
    mine = own.get_added_tokens_decoder()
    for identifier, token in loaded.added_tokens_decoder.items():
        if identifier not in mine and not token.special:
            raise UserError(
                f"tokenizer of {source}: the token {token.content!r} ({identifier}) stands in "
                f"{TOKENIZER_CONFIG_FILE} alone, and {TOKENIZER_FILE} splits it; make the two "
                "agree on what the model was trained with"
            )
        if identifier not in mine:
            logger.info(
                "%s has the token %r (%d), %s has not",
                *(TOKENIZER_CONFIG_FILE, token.content, identifier, TOKENIZER_FILE),
            )
    # One that is known already keeps its id and takes these rules of matching.
    backend.add_special_tokens([token for token in mine.values() if token.special])
    backend.add_tokens([token for token in mine.values() if not token.special])


def _check_prefix_space(
    loaded: PreTrainedTokenizerFast, own: Tokenizer, source: str | Path
) -> None:
    """Where the two disagree, transformers 4 changes the pipeline and 5 does not."""
    actual = getattr(own.pre_tokenizer, "add_prefix_space", None)
    declared = loaded.init_kwargs.get("add_prefix_space")
    if actual is None:
        return
    if declared is not None and declared != actual:
        raise UserError(
            f"tokenizer of {source}: add_prefix_space is {declared} in {TOKENIZER_CONFIG_FILE} and "
            f"{actual} in {TOKENIZER_FILE}; make the two agree on what the model was trained with"
        )
    loaded.init_kwargs["add_prefix_space"] = actual
    loaded.add_prefix_space = actual


def _check_ids(loaded: Tokenizer, own: Tokenizer, source: str | Path) -> None:
    """Whether both give the same ids on the probing texts and around every added token."""
    texts = [*probing_texts(), *(_around(t) for t in own.get_added_tokens_decoder().values())]
    for text, found, wanted in zip(texts, _encode(loaded, texts), _encode(own, texts), strict=True):
        if found != wanted:
            raise UserError(
                f"tokenizer of {source}: transformers does not follow its {TOKENIZER_FILE}: "
                f"{text!r} becomes {found}, but {wanted} there; see {TOKENIZER_CONFIG_FILE}"
            )


def _around(token: AddedToken) -> str:
    return f"a{token.content}b {token.content} \n{token.content}\n{token.content}{token.content}"


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found: list[Any] = tokenizer.encode_batch(list(texts), add_special_tokens=True)
    if truncation:
        tokenizer.enable_truncation(**truncation)
    if padding:
        tokenizer.enable_padding(**padding)
    return [encoding.ids for encoding in found]
