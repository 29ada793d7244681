"""Greedy continuations, for a look at what a model writes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)


class Model(Protocol):
    """Says which token comes next."""

    def new_cache(self, batch_size: int, length: int, /) -> Any | None:  # noqa: ANN401 - the model's
        """Room for keys and values of texts of a length; None where the model can keep none."""

    def next_tokens(
        self,
        tokens_bs: torch.Tensor,
        last_b: list[int],
        cache: Any | None = None,  # noqa: ANN401
        /,
    ) -> list[int]:
        """The most probable token after position `last_b` of each text.

        Args:
            tokens_bs: int64, right-padded.
            last_b: positions in `tokens_bs`.
            cache: that has seen what was before these tokens, and then has seen them too.
        """


def continuations(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    max_length: int,
) -> list[list[int]]:
    """Continue each prompt with the model's most probable tokens.

    With a key-value cache, each token costs a forward pass of one position, if the model can keep
    one and the text stays within `max_length`; a window that slides has other positions at every
    token, so all of it runs again.

    Args:
        model: that continues.
        prompts: token ids of each prompt, at least one.
        max_new_tokens: most tokens that are added to a prompt.
        stop_ids: tokens that end a text; they are not part of the result.
        max_length: tokens that the model can look back on; what is older is not seen.

    Returns:
        The new tokens of each prompt, without the prompt.
    """
    texts = [list(prompt) for prompt in prompts]
    ends = [len(prompt) + max_new_tokens for prompt in prompts]
    with torch.inference_mode():
        # The last token that is written is not read.
        whole = [i for i, end in enumerate(ends) if end - 1 > max_length]
        for group in _groups([i for i in range(len(texts)) if i not in whole], texts, ends):
            cache = model.new_cache(len(group), max(ends[i] for i in group) - 1)
            if cache is None:
                whole += group
            else:
                _with_cache(model, cache, group, texts, ends, stop_ids)
        if whole:
            logger.info("%d continuations without a key-value cache", len(whole))
            _without_cache(model, whole, texts, ends, stop_ids, max_length)
    new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens for tokens in new]


def _groups(
    indices: list[int], texts: Sequence[Sequence[int]], ends: Sequence[int]
) -> list[list[int]]:
    """Texts that are run together: before the shortest would end, the longest begins to be written.

    All texts of a batch are at the same position; where one reads its prompt, another may write.
    A text that is much longer is better read at once, in a batch of its own.
    """
    groups: list[list[int]] = []
    for i in sorted(indices, key=lambda i: len(texts[i])):
        if groups and len(texts[i]) < ends[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _with_cache(
    model: Model,
    cache: Any,  # noqa: ANN401
    group: list[int],
    texts: list[list[int]],
    ends: Sequence[int],
    stop_ids: Collection[int],
) -> None:
    """Add to the texts of a group, in order of their lengths, until each has come to its end."""
    done, length = 0, len(texts[group[0]])
    running = set(group)
    while running:
        # Finished texts stay in the batch; nothing is done with what they say.
        new = [texts[i][done:length] or [0] for i in group]
        tokens = model.next_tokens(torch.tensor(new), [length - done - 1] * len(group), cache)
        done, length = length, length + 1
        for i, token in zip(group, tokens, strict=True):
            if i in running and len(texts[i]) == done:
                texts[i].append(token)
                if token in stop_ids or len(texts[i]) == ends[i]:
                    running.remove(i)


def _without_cache(
    model: Model,
    running: list[int],
    texts: list[list[int]],
    ends: Sequence[int],
    stop_ids: Collection[int],
    max_length: int,
) -> None:
    """Run the whole text again for each token."""
    while running:
        seen = [texts[i][-max_length:] for i in running]
        tokens_bs = torch.zeros(len(seen), max(map(len, seen)), dtype=torch.int64)
        for row, tokens in enumerate(seen):
            tokens_bs[row, : len(tokens)] = torch.tensor(tokens)
        chosen = model.next_tokens(tokens_bs, [len(tokens) - 1 for tokens in seen])
        for i, token in zip(running, chosen, strict=True):
            texts[i].append(token)
        running = [i for i in running if texts[i][-1] not in stop_ids and len(texts[i]) < ends[i]]
