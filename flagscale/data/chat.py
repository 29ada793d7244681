"""Conversations -> token ids, and which of them the assistant says.

The tokenizer's chat template writes a conversation out. Where it marks the assistant's parts with
`{% generation %}`, these are what is learnt. Otherwise a message's part is what the template adds
for it: the conversation up to a message, with the prompt to answer, must be the beginning of the
conversation with the message, and that of the whole.
"""

from __future__ import annotations

import hashlib
import re
import threading
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from flagscale.data.encoder import EncodedDocument, choose_split, token_dtype, vocabulary_size
from flagscale.data.messages import ASSISTANT, Message, load_messages
from flagscale.data.sources import Document
from flagscale.errors import UserError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class ChatEncoder:
    """Conversations -> token ids with EOD at the end, and masks. Safe to call from several threads.

    Args:
        tokenizer: with a chat template.
        eod_id: added at the end, without loss, unless the template ends with it.
        validation_fraction: see `choose_split`.
        test_fraction: likewise.

    Attributes:
        vocab_size: ids are below it.
        dtype: of the ids.
        control_tokens: conversations so far in which a message holds a special token's name. It is
            encoded as that token: a template's output does not tell who wrote it.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        eod_id: int,
        validation_fraction: float,
        test_fraction: float,
    ) -> None:
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                "data.format='chat': the tokenizer has no chat_template, which says how a "
                "conversation is written; name one that has (an instruct model's) in "
                f"data.tokenizer, or use text ({str(error)[:80]})"
            ) from error
        self._is_marked = _MARKED.search(self._template) is not None
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._special = re.compile("|".join(map(re.escape, sorted(tokenizer.all_special_tokens))))
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # It would only trim blanks from the tokens' places: no special tokens are added here.
        self._backend.post_processor = None
        self._rendering = threading.Lock()  # of jinja's marks, which know one rendering at a time
        self._eod_id = eod_id
        self._fractions = (validation_fraction, test_fraction)
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = token_dtype(tokenizer)
        self.control_tokens = 0

    def __call__(self, documents: list[Document]) -> list[EncodedDocument]:
        """Encode a batch and choose the splits; conversations without an answer are left out.

        Raises:
            UserError: the template refuses a conversation, or does not write it message by message.
        """
        kept, texts, spans = [], [], []
        for document in documents:
            messages = load_messages(document.text)
            if not any(message["role"] == ASSISTANT for message in messages):
                continue
            with self._rendering:
                text, found = self._render(messages, document.origin)
                self.control_tokens += any(self._special.search(m["content"]) for m in messages)
            kept.append((document, sum(len(message["content"]) for message in messages)))
            texts.append(text)
            spans.append(found)
        encoded = []
        for (document, characters), found, encoding in zip(
            kept, spans, self._backend.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            ids = np.array(encoding.ids, self.dtype)
            starts = np.array([start for start, _ in encoding.offsets], np.int64)
            mask = np.zeros(len(ids), np.uint8)
            for start, stop in found:
                mask[(starts >= start) & (starts < stop)] = 1
            if not len(ids) or ids[-1] != self._eod_id:
                ids = np.append(ids, ids.dtype.type(self._eod_id))
                mask = np.append(mask, np.uint8(0))
            digest = hashlib.sha256(document.text.encode()).digest()
            split = choose_split(digest, *self._fractions)
            encoded.append(
                EncodedDocument(split, int.from_bytes(digest[-8:], "big"), characters, ids, mask)
            )
        return encoded

    def _render(self, messages: list[Message], origin: str) -> tuple[str, list[Span]]:
        """A conversation's text, and where in it the assistant speaks."""
        text, marked = self._write(messages, origin)
        if self._is_marked:
            return text, marked
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            if i == 0:
                raise UserError(
                    f"{origin}: the conversation begins with an answer, and the tokenizer's chat "
                    "template does not mark answers ({% generation %}); begin with a question"
                )
            before, _ = self._write(messages[:i], origin, prompt=True)
            if not text.startswith(before):
                before, _ = self._write(messages[:i], origin)
            after, _ = self._write(messages[: i + 1], origin)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"{origin}: message {i + 1} changes how the tokenizer's chat template writes "
                    "the messages before it, so its own part cannot be told from theirs; use a "
                    "template that marks answers ({% generation %}), or drop this conversation"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _write(
        self, messages: list[Message], origin: str, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            # Its annotation speaks of a single text.
            written: Any = render_jinja_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._is_marked,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{origin}: the tokenizer's chat template refuses this conversation: "
                f"{type(error).__name__}: {str(error)[:200]}"
            ) from error
        texts, spans = written
        return texts[0], spans[0] if self._is_marked else []
