"""What a student took to make and takes to run: tokens, time, memory, operations, energy, money."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Costs:
    """Of one training, and of the models that were compared.

    Attributes:
        tokens: that were trained on, those of all ranks together.
        seconds: of the training's steps, without start, validations and checkpoints.
        processes: ranks.
        device: `cpu` or `cuda`.
        flops: operations of the training, by counting (`flagscale.sizes.work`).
        peak_memory: of the training step, bytes of the rank that held most: `host`, `device`.
        weight_bytes: of each model as it is stored.
        flops_a_token: of each model's forward pass.
        energy_joules: of all ranks; None where nothing is known.
        energy_from: how that is known, for a sentence.
        price: for the training's time, in the recipe's currency; None without a price.
    """

    tokens: int
    seconds: float
    processes: int
    device: str
    flops: float
    peak_memory: dict[str, int] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    flops_a_token: dict[str, float] = field(default_factory=dict)
    energy_joules: float | None = None
    energy_from: str = ""
    price: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together, on average."""
        return self.tokens / self.seconds if self.seconds else 0.0
