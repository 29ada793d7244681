"""Prompts as token ids, beginning as the documents do that the models have learnt from."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from flagscale.errors import UserError


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast, bos_id: int | None, vocab_size: int
) -> list[list[int]]:
    """The token ids of each prompt.

    Args:
        prompts: the recipe's. Names of special tokens in them are these tokens: a prompt may be
            what a chat template has written.
        tokenizer: the dataset's.
        bos_id: that its documents begin with; None: none.
        vocab_size: of the models; a tokenizer may know more tokens.

    Raises:
        UserError: a prompt has no tokens, or one that the models do not know.
    """
    bos = [] if bos_id is None else [bos_id]
    encoded = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"evaluation.prompts: {prompt!r} has no tokens; write some text")
        if max(ids) >= vocab_size:
            name = tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"evaluation.prompts: {prompt!r} has the token {name!r} ({max(ids)}), but the "
                f"models' vocab_size is {vocab_size}; leave it out"
            )
        encoded.append(ids if ids[:1] == bos else [*bos, *ids])  # a template may write BOS
    return encoded
