"""What is told of conversations: how many were cut, left out, or written otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass
class ChatCounts:
    """What a user may not expect of how the conversations of a corpus were taken.

    Attributes:
        left_out: conversations without an answer that is learnt.
        too_long: conversations left out, since nothing that is learnt is within `seq_length`.
        lost_answers: answers of all conversations that `seq_length` cuts or leaves out.
        lost_tokens: tokens of these that would have been learnt.
        changed_answers: answers whose blanks the template trims or writes otherwise.
        unmarked_answers: answers that the template's marks do not hold all of.
        changed_prompts: conversations with a message, no answer, that the template changes.
        several_texts: conversations with more than one text, since the template rewrites answers.
        control_tokens: conversations in which a message holds a special token's name. It is encoded
            as that token: a template's output does not tell who wrote it.
        seq_length_for_some: the least with which something is learnt of one that was too long; 0
            where none was.
        seq_length_for_all: the least with which nothing is lost.
    """

    left_out: int = 0
    too_long: int = 0
    lost_answers: int = 0
    lost_tokens: int = 0
    changed_answers: int = 0
    unmarked_answers: int = 0
    changed_prompts: int = 0
    several_texts: int = 0
    control_tokens: int = 0
    seq_length_for_some: int = 0
    seq_length_for_all: int = 0

    def add(self, other: ChatCounts) -> None:
        """Count what another has counted too."""
        some = [c.seq_length_for_some for c in (self, other) if c.seq_length_for_some]
        every = max(self.seq_length_for_all, other.seq_length_for_all)
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.seq_length_for_some, self.seq_length_for_all = min(some, default=0), every


def total(facts: Iterable[dict[str, int]]) -> ChatCounts:
    """Of several corpora.

    Args:
        facts: a `ChatCounts` each, as it stands in the manifest.
    """
    counts = ChatCounts()
    for one in facts:
        counts.add(ChatCounts(**one))
    return counts


def told(facts: dict[str, int] | None, seq_length: int) -> list[str]:
    """What the log says of a corpus' conversations; nothing where all is as it seems.

    Args:
        facts: a `ChatCounts`, as it stands in the manifest; None: there are no conversations.
        seq_length: tokens a sample.
    """
    if facts is None:
        return []
    longer = f"with data.seq_length={facts['seq_length_for_all']} nothing is lost"
    lines = {
        "left_out": "conversations without an answer that is learnt left out",
        "too_long": f"conversations left out: no answer begins within seq_length={seq_length}; "
        + longer,
        "lost_answers": f"answers lose their end, or all, beyond {seq_length + 1} tokens "
        f"({facts['lost_tokens']} tokens that would be learnt); {longer}",
        "changed_answers": "answers have other blanks in the chat template's text than in the row",
        "unmarked_answers": "answers are not learnt whole: the chat template marks less of them "
        "({% generation %})",
        "changed_prompts": "conversations have a message that the chat template leaves out or "
        "changes (no answer)",
        "several_texts": "conversations have more than one text, since the chat template writes "
        "an answer otherwise once others follow",
        "control_tokens": "conversations hold a special token's name, which is encoded as that "
        "token",
    }
    return [f"{facts[name]} {line}" for name, line in lines.items() if facts[name]]
