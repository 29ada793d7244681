"""The codec that an artifact names."""

from __future__ import annotations

from flagscale.errors import UserError
from flagscale.teacher_outputs.facts import OutputsFacts
from flagscale.teacher_outputs.hidden import HiddenCodec
from flagscale.teacher_outputs.values import Codec


def codec_of(facts: OutputsFacts) -> Codec:
    """The codec of `facts.codec`: its name and its options.

    Raises:
        UserError: this program knows none of that name, or not with these options.
    """
    options = dict(facts.codec)
    name = options.pop("name", None)
    made = {
        "hidden": lambda: HiddenCodec(facts.seq_length, **options),
    }
    try:
        return made[name]()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"teacher-outputs of codec {facts.codec}: this program knows {', '.join(made)}: "
            f"{error}; make them anew"
        ) from error
