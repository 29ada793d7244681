"""The tokens that stand at a document's borders: BOS before it, EOD after it."""

from __future__ import annotations

import difflib
import logging
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import Tokenizer

from flagscale.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# What ends a document, and never a turn, in the pre-training of the families that use it.
_DOCUMENT_ENDS = (
    "<|endoftext|>",  # GPT-2, Qwen, SmolLM, Falcon 3
    "<|end_of_text|>",  # Llama 3, Granite
    "</s>",  # Llama 1 and 2, Mistral
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "<eos>",  # Gemma
)
_TURN_ENDS = {
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>"),
    *("<|endofturn|>", "<|return|>", "<|eot|>", "<turn|>"),
}
OWN = "auto"


class DocumentTokens(NamedTuple):
    """Ids of the tokens at the borders of a document.

    Attributes:
        eod: after each document.
        bos: before each document; None: there is none.
    """

    eod: int
    bos: int | None


def find_document_tokens(
    tokenizer: PreTrainedTokenizerFast, eod_token: str | None, bos_token: str | None
) -> DocumentTokens:
    """What a document begins and ends with, as the model was trained.

    Args:
        tokenizer: the model's.
        eod_token: the recipe's; see `find_eod`.
        bos_token: the recipe's; see `find_bos`.

    Raises:
        UserError: it cannot be told, or both are the same token.
    """
    tokens = DocumentTokens(find_eod(tokenizer, eod_token), find_bos(tokenizer, bos_token))
    if tokens.bos == tokens.eod:
        raise UserError(
            f"data.bos_token and data.eod_token are both {_name(tokenizer, tokens.eod)!r}, so "
            "borders between documents could not be told; say data.bos_token: '' (the token after "
            "each document then is the one before the next), or name another"
        )
    logger.info(
        "documents begin with %s and end with %r",
        "no token of their own" if tokens.bos is None else repr(_name(tokenizer, tokens.bos)),
        _name(tokenizer, tokens.eod),
    )
    return tokens


def find_eod(tokenizer: PreTrainedTokenizerFast, eod_token: str | None) -> int:
    """Id of the token between documents.

    By default EOS, if it is known to end documents. That of a model that was trained to converse
    ends a turn; then it is the one token of the vocabulary that is known to end documents. An EOS
    that is neither is taken for what it is called.

    Args:
        tokenizer: the model's.
        eod_token: the recipe's; None: as above.

    Raises:
        UserError: the tokenizer does not know the token, or it cannot be told which one it is.
    """
    if eod_token is not None:
        return _known(tokenizer, "eod_token", eod_token)
    eos = tokenizer.eos_token
    if eos in _DOCUMENT_ENDS:
        return _known(tokenizer, "eod_token", str(eos))
    added = tokenizer.get_added_vocab()
    ends = [name for name in _DOCUMENT_ENDS if name in added]
    if len(ends) == 1:
        return added[ends[0]]
    if ends:
        raise UserError(
            f"data.eod_token: the tokenizer knows {' and '.join(ends)}, and its EOS is {eos!r}; "
            "name the one that stood between documents in the model's pre-training"
        )
    if eos is None:
        raise UserError("data.eod_token: the tokenizer has no EOS token, so one must be named")
    template = str(tokenizer.chat_template or "")
    if eos in _TURN_ENDS or str(eos) in template:
        raise UserError(
            f"data.eod_token: the tokenizer's EOS, {eos!r}, ends the turns of a conversation, and "
            f"it knows none of {', '.join(_DOCUMENT_ENDS)}; name the token that stood between "
            "documents in the model's pre-training"
        )
    return _known(tokenizer, "eod_token", str(eos))


def find_bos(tokenizer: PreTrainedTokenizerFast, bos_token: str | None) -> int | None:
    """Id of the token in front of a document; None: there is none.

    Args:
        tokenizer: the model's.
        bos_token: the recipe's; `auto`: what the tokenizer's own post-processor puts in front of a
            text; None or empty: none.

    Raises:
        UserError: the tokenizer does not know the token, or its files do not agree on one.
    """
    if not bos_token:
        return None
    if bos_token != OWN:
        return _known(tokenizer, "bos_token", bos_token)
    before = _put_in_front(tokenizer.backend_tokenizer)
    if len(before) > 1:
        names = [_name(tokenizer, identifier) for identifier in before]
        raise UserError(
            f"data.bos_token: the tokenizer puts {names} in front of a text; name the one token "
            "that documents began with in the model's pre-training, or '' for none"
        )
    declared = tokenizer.init_kwargs.get("add_bos_token")
    if declared is not None and bool(declared) != bool(before):
        raise UserError(
            f"data.bos_token: add_bos_token is {declared} in tokenizer_config.json, but "
            f"tokenizer.json puts {_name(tokenizer, before[0]) if before else 'nothing'} in front "
            "of a text; name the token that documents began with in the model's pre-training, or "
            "'' for none"
        )
    return before[0] if before else None


def _put_in_front(backend: Tokenizer) -> list[int]:
    alone, whole = (
        [identifier for identifier, counts in zip(e.ids, e.attention_mask, strict=True) if counts]
        for e in (backend.encode("a", add_special_tokens=own) for own in (False, True))
    )
    return whole[: next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)]


def _known(tokenizer: PreTrainedTokenizerFast, field: str, token: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        known = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        near = difflib.get_close_matches(token, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"special tokens: {', '.join(known)}"
        raise UserError(f"data.{field}={token!r}: not in the tokenizer's vocabulary; {hint}")
    return vocabulary[token]


def _name(tokenizer: PreTrainedTokenizerFast, identifier: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(identifier))
