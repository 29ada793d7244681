"""Greedy continuations from a function that gives logits, for a look at what a model writes.

There is no key-value cache: at the few tokens a report shows, running the whole text again costs
seconds. It also means that a continuation uses exactly the forward pass that was measured.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from flagscale.evaluation.fidelity import LogitsFunction


def continuations(
    logits: LogitsFunction,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    max_length: int,
) -> list[list[int]]:
    """Continue each prompt with the model's most probable tokens.

    Args:
        logits: tokens [b, s] (int64, right-padded) -> logits [b, s, V], causal.
        prompts: token ids of each prompt, at least one.
        max_new_tokens: most tokens that are added to a prompt.
        stop_ids: tokens that end a text; they are not part of the result.
        max_length: tokens that the model can look back on; what is older is not seen.

    Returns:
        The new tokens of each prompt, without the prompt.
    """
    texts = [list(prompt) for prompt in prompts]
    running = list(range(len(texts)))
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            if not running:
                break
            seen = [texts[i][-max_length:] for i in running]
            tokens_bs = torch.zeros(len(seen), max(map(len, seen)), dtype=torch.int64)
            for row, tokens in enumerate(seen):
                tokens_bs[row, : len(tokens)] = torch.tensor(tokens)
            logits_bsv = logits(tokens_bs)
            last_bv = torch.stack(
                [logits_bsv[row, len(tokens) - 1] for row, tokens in enumerate(seen)]
            )
            chosen = last_bv.argmax(dim=-1).tolist()
            for i, token in zip(running, chosen, strict=True):
                texts[i].append(token)
            running = [i for i, token in zip(running, chosen, strict=True) if token not in stop_ids]
    new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens for tokens in new]
