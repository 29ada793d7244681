"""What terms of the distillation loss inside the models cost a rank: projections, kept states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flagscale.megatron.paired_layers import (
    AttentionPair,
    HiddenPair,
    attention_pairs,
    hidden_pairs,
)
from flagscale.megatron.pipeline_cargo import Cargo, cargo_of, leaving
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe
from flagscale.sizes.activations import FLOAT32
from flagscale.sizes.layout import Layout

# Scores of attention relations that are made at a time, and how many such buffers live then
# (`flagscale.post_training.attention_relations`).
SCORES = 2**22
_BUFFERS = 6
# How often a score is read or written there, both models' together: forward, and in training, which
# makes them again for the backward pass.
PASSES = {"kl": (23, 56), "mse": (14, 41), "cosine": (24, 77)}
STUDENT, TEACHER = "student", "teacher"


@dataclass(frozen=True)
class Terms:
    """The terms of a recipe in two models, and a rank's share of them.

    Attributes:
        distillation: the recipe's section.
        student: its shape.
        teacher: its shape.
        layout: how ranks share both.
        dtype_bytes: of a number that they compute with.
    """

    distillation: DistillationRecipe
    student: ModelShape
    teacher: ModelShape
    layout: Layout
    dtype_bytes: int

    def projection_parameters(self, stage: int) -> int:
        """Of a stage's projections; every tensor-parallel rank has all of each."""
        return sum(
            (pair.student.width + 1) * pair.teacher.width
            for pair in self._hidden
            if pair.stage == stage and pair.needs_projection
        )

    def kept(self, stage: int, tokens: int) -> int:
        """Bytes that a micro-batch leaves for the backward pass, and in what is passed on.

        Args:
            stage: of the pipeline.
            tokens: of the micro-batch, on this rank.
        """
        size, share = self.dtype_bytes, self._sequence_ranks
        hidden = sum(_hidden(pair, size) for pair in self._hidden if pair.stage == stage)
        attention = sum(_attention(pair, size) for pair in self._attention if pair.stage == stage)
        passed_on = size * _columns(leaving(self._cargo, stage))
        return int(tokens * ((hidden + passed_on) / share + attention / self.layout.tensor))

    def columns_received(self, stage: int) -> int:
        """Numbers a token that come from the stage before, beside the models' hidden states."""
        return _columns(leaving(self._cargo, stage - 1))

    def transient(self, stage: int, tokens: int, seq_length: int) -> int:
        """Bytes of the scores while attention terms are computed, forward or backward.

        Args:
            stage: of the pipeline.
            tokens: of the micro-batch, on this rank.
            seq_length: tokens that one may relate to.
        """
        if not any(pair.stage == stage for pair in self._attention):
            return 0
        heads = self.distillation.attention_relation_heads or self.student.num_attention_heads
        scores = tokens * seq_length * heads // self.layout.tensor
        return FLOAT32 * _BUFFERS * min(SCORES, scores)

    def flops(self, tokens: int, micro_batch_size: int, seq_length: int, *, trains: bool) -> float:
        """Operations of matrix products, of all ranks together.

        Args:
            tokens: in all.
            micro_batch_size: sequences that scores are made of at a time.
            seq_length: tokens that one may relate to.
            trains: with the backward pass, which makes scores of both models again.
        """
        products = 2.0 * sum(
            pair.student.width * pair.teacher.width
            for pair in self._hidden
            if pair.needs_projection
        )
        # Gradients are the student's alone.
        passes = {STUDENT: 4, TEACHER: 2} if trains else {STUDENT: 1, TEACHER: 1}
        columns = self._columns_seen(micro_batch_size, seq_length)
        scores = len(self.distillation.attention_relations) * sum(
            2.0 * passes[who] * layer.width * columns
            for pair in self._attention
            for who, layer in dict(pair.layers).items()
        )
        return tokens * (products * (3 if trains else 1) + scores)

    def touched(
        self, tokens: int, micro_batch_size: int, seq_length: int, *, trains: bool
    ) -> float:
        """Bytes of scores that are read and written: what attention terms take their time for.

        Args: see `flops`.
        """
        heads = self.distillation.attention_relation_heads or self.student.num_attention_heads
        maps = len(self._attention) * len(self.distillation.attention_relations) * heads
        scores = float(tokens) * maps * self._columns_seen(micro_batch_size, seq_length)
        return scores * FLOAT32 * PASSES[self.distillation.attention_fit][trains]

    def _columns_seen(self, micro_batch_size: int, seq_length: int) -> float:
        """Of a row of scores, on average: those of a block go up to the block's last row."""
        heads = self.distillation.attention_relation_heads or self.student.num_attention_heads
        heads //= self.layout.tensor
        block = min(seq_length, max(1, SCORES // (micro_batch_size * heads * seq_length)))
        return (seq_length + block) / 2

    @property
    def _hidden(self) -> list[HiddenPair]:
        return hidden_pairs(self.distillation, self.student, self.teacher, self.layout.pipeline)

    @property
    def _attention(self) -> list[AttentionPair]:
        return attention_pairs(self.distillation, self.student, self.teacher, self.layout.pipeline)

    @property
    def _cargo(self) -> list[Cargo]:
        return cargo_of(
            [*self._hidden, *self._attention],
            self.layout.pipeline,
            self.dtype_bytes,
            self.layout.tensor,
            sequence_parallel=self.layout.sequence_parallel,
        )

    @property
    def _sequence_ranks(self) -> int:
        return self.layout.tensor if self.layout.sequence_parallel else 1


def _hidden(pair: HiddenPair, size: int) -> int:
    """Bytes a token of one pair: the difference; or both states in fp32, and the projected one."""
    width = pair.teacher.width
    copied = size < FLOAT32 or pair.needs_projection
    kept = FLOAT32 * width * (1 if pair.fit == "mse" else 1 + copied)
    return kept + (size * width if pair.needs_projection and size < FLOAT32 else 0)


def _attention(pair: AttentionPair, size: int) -> int:
    """Bytes a token of one pair: both models' queries, keys and values, each for every head."""
    return size * sum(layer.width for _, layer in pair.layers)


def _columns(cargo: Iterable[Cargo]) -> int:
    return sum(one.columns for one in cargo)
