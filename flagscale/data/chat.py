"""Conversations -> token ids, and which of them the assistant says."""

from __future__ import annotations

import hashlib
import re
import threading
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from flagscale.data.chat_counts import ChatCounts
from flagscale.data.encoder import EncodedDocument, choose_split, token_dtype, vocabulary_size
from flagscale.data.messages import ASSISTANT, identity, load_conversation
from flagscale.data.rows import BadRow
from flagscale.data.sources import Document
from flagscale.data.template import ChatTemplate, Rendering


class ChatEncoder:
    """Conversations -> token ids with EOD at the end, and masks. Safe to call from several threads.

    Args:
        tokenizer: with a chat template.
        eod_id: added at the end, without loss, unless the template ends with it.
        validation_fraction: see `choose_split`.
        test_fraction: likewise.
        seq_length: what lies behind the token after it is not learnt.
        arguments: further variables of the template.
        last_only: learn the last answer of a conversation alone.

    Attributes:
        vocab_size: ids are below it.
        dtype: of the ids.
        template: the tokenizer's.
        counts: of the conversations so far.
        end_ids: added tokens that were learnt right behind an answer's text: they end its turn.

    Raises:
        UserError: the tokenizer has no chat template, or it knows no such variable.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        eod_id: int,
        validation_fraction: float,
        test_fraction: float,
        seq_length: int,
        arguments: dict[str, Any] | None = None,
        last_only: bool = False,
    ) -> None:
        self.template = ChatTemplate(tokenizer, arguments or {})
        self._special = re.compile("|".join(map(re.escape, sorted(tokenizer.all_special_tokens))))
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # It would only trim blanks from the tokens' places: no special tokens are added here.
        self._backend.post_processor = None
        self._eod_id = eod_id
        self._fractions = (validation_fraction, test_fraction)
        self._capacity = seq_length + 1  # tokens of a sample: labels are shifted by one
        self._last_only = last_only
        self._counting = threading.Lock()
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = token_dtype(tokenizer)
        self.counts = ChatCounts()
        self.end_ids: set[int] = set()
        self._added = set(self._backend.get_added_tokens_decoder())

    def __call__(self, documents: list[Document]) -> list[EncodedDocument | BadRow]:
        """Encode a batch and choose the splits.

        Conversations of which nothing is learnt are left out and counted. One may become several
        documents: see `flagscale.data.template`.
        """
        counts = ChatCounts()
        encoded: list[EncodedDocument | BadRow] = []
        texts: list[tuple[int, Rendering]] = []
        firsts: list[EncodedDocument] = []
        for document in documents:
            conversation = load_conversation(document.text)
            answers = [m for m in conversation.messages if m["role"] == ASSISTANT]
            if not any(message.get("weight", 1) for message in answers):
                counts.left_out += 1
                continue
            try:
                found = self.template.render(conversation, self._last_only, document.origin)
            except BadRow as error:
                encoded.append(error)
                continue
            contents = [message["content"] or "" for message in conversation.messages]
            counts.control_tokens += any(map(self._special.search, contents))
            counts.changed_prompts += not all(rendering.is_asked for rendering in found)
            counts.several_texts += len(found) > 1
            digest = hashlib.sha256(identity(conversation)).digest()
            hash64 = int.from_bytes(digest[-8:], "big")
            characters = sum(map(len, contents))
            split = choose_split(digest, *self._fractions)
            texts += ((len(firsts), rendering) for rendering in found)
            firsts.append(EncodedDocument(split, hash64, characters, np.empty(0)))
        encodings = self._backend.encode_batch(
            [rendering.text for _, rendering in texts], add_special_tokens=False
        )
        kept: set[int] = set()
        too_long: set[int] = set()
        for (number, rendering), encoding in zip(texts, encodings, strict=True):
            ids, mask = self._learnt(rendering, encoding, counts)
            if not mask[1 : self._capacity].any():
                if mask[1:].any():
                    too_long.add(number)
                continue
            first = firsts[number]
            if number in kept:  # the conversation has been counted
                first = first._replace(hash64=None, characters=0)
            kept.add(number)
            encoded.append(first._replace(ids=ids, mask=mask))
        lost = set(range(len(firsts))) - kept
        counts.too_long += len(lost & too_long)
        counts.left_out += len(lost - too_long)
        with self._counting:
            self.counts.add(counts)
        return encoded

    def _learnt(
        self, rendering: Rendering, encoding: Encoding, counts: ChatCounts
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, EOD last, and the mask of what is learnt."""
        ids = np.array(encoding.ids, self.dtype)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), np.uint8)
        for answer in rendering.answers:
            own = np.zeros(len(ids), bool)
            for start, stop in answer.spans:  # a token that only begins before an answer is learnt
                own |= (places[:, 0] < stop) & (places[:, 1] > start)
            mask[own] = 1
            if answer.end is not None:
                behind = ids[own & (places[:, 0] >= answer.end)][:1].tolist()
                self.end_ids.update(self._added.intersection(behind))
            counts.lost_answers += bool(own[self._capacity :].any())
            counts.changed_answers += not answer.is_exact
            counts.unmarked_answers += not answer.is_marked
        last = int(np.flatnonzero(mask)[-1]) if mask.any() else 0
        counts.seq_length_for_all = max(counts.seq_length_for_all, last)
        counts.lost_tokens += int(mask[self._capacity :].sum())
        if mask[1:].any() and not mask[1 : self._capacity].any():
            first = int(np.flatnonzero(mask[1:])[0]) + 1
            counts.seq_length_for_some = min(counts.seq_length_for_some or first, first)
        if not len(ids) or ids[-1] != self._eod_id:
            ids = np.append(ids, ids.dtype.type(self._eod_id))
            mask = np.append(mask, np.uint8(0))
        return ids, mask
