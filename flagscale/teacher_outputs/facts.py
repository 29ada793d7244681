"""What teacher outputs are of: who was asked what, and how the answers are kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from flagscale.errors import UserError

KIND = "teacher-outputs"
VERSION = 1


@dataclass(frozen=True)
class OutputsFacts:
    """Two with equal facts have equal records for equal samples.

    Attributes:
        codec: its `name` and options, see `Codec.options`.
        teacher: the teacher's digest.
        dataset: the dataset's digest.
        tokenizer: the tokenizer's hash.
        seq_length: tokens of a sample.
        reset_attention_mask: whether documents of a sample saw one another (False: they did).
        params_dtype: that the teacher ran in: `bf16`, `fp16` or `fp32`.
        vocab_size: tokens, without the output layer's padding.
        version: of records, shards and indices.
    """

    codec: dict[str, Any]
    teacher: str
    dataset: str
    tokenizer: str | None
    seq_length: int
    reset_attention_mask: bool
    params_dtype: str
    vocab_size: int
    version: int = VERSION

    def values(self) -> dict[str, Any]:
        """Plain values, as in a manifest."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> OutputsFacts:
        """The facts among a manifest's.

        Raises:
            UserError: they are of another version, or one is missing.
        """
        version = values.get("version")
        if version != VERSION:
            raise UserError(
                f"{KIND} of version {version}, this program reads {VERSION}; make them anew"
            )
        names = [field.name for field in fields(cls)]
        absent = [name for name in names if name not in values]
        if absent:
            raise UserError(f"{KIND}: the manifest has no {', '.join(absent)}; make them anew")
        return cls(**{name: values[name] for name in names})

    def differences(self, others: OutputsFacts) -> list[str]:
        """`field: this value, not that one` for each that differs."""
        here, there = self.values(), others.values()
        return [f"{k}: {here[k]}, not {there[k]}" for k in here if here[k] != there[k]]
