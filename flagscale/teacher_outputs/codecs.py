"""The codec that an artifact names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flagscale.errors import UserError
from flagscale.teacher_outputs.facts import OutputsFacts
from flagscale.teacher_outputs.values import Codec


def codec_of(facts: OutputsFacts) -> Codec:
    """The codec of `facts.codec`: its name and its options.

    Raises:
        UserError: this program knows none of that name, or not with these options.
    """
    # Not above: who only looks at an artifact needs no torch.
    from flagscale.teacher_outputs.hidden import HiddenCodec
    from flagscale.teacher_outputs.sampled import SampledCodec
    from flagscale.teacher_outputs.top_k import TopKCodec

    options = dict(facts.codec)
    name = options.pop("name", None)
    sizes = facts.seq_length, facts.vocab_size
    made: dict[Any, Callable[[], Codec]] = {
        "hidden": lambda: HiddenCodec(facts.seq_length, **options),
        "sampled": lambda: SampledCodec(*sizes, **options),
        "topk": lambda: TopKCodec(*sizes, **options),
    }
    try:
        return made[name]()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"teacher-outputs of codec {facts.codec}: this program knows {', '.join(made)}: "
            f"{error}; make them anew"
        ) from error
