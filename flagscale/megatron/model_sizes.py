"""The sizes of a model, whoever knows them."""

from __future__ import annotations

from typing import Protocol


class Sizes(Protocol):
    """What a `ModelShape` and Megatron-Core's `TransformerConfig` both say of a model."""

    @property
    def num_layers(self) -> int:
        """Of the whole model."""

    @property
    def hidden_size(self) -> int:
        """Channels between layers."""

    @property
    def ffn_hidden_size(self) -> int:
        """Channels inside an MLP."""

    @property
    def num_attention_heads(self) -> int:
        """Of queries."""

    @property
    def num_query_groups(self) -> int:
        """Heads of keys and values."""

    @property
    def kv_channels(self) -> int:
        """Of a head."""
