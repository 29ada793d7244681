"""Terms of the distillation loss that are made inside the models, on any pipeline stage.

ModelOpt's criteria are computed by the loss function, which the schedule calls on the last stage
alone. These are computed at the end of each stage's forward pass, token by token; what they need of
an earlier stage, and what a later one needs of them, travels with the hidden states
(`flagscale.megatron.pipeline_cargo`). So the last stage's loss function finds them all, under its
mask, and Megatron-Core's schedules carry their gradients back as they do any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from flagscale.megatron.attention import whole_sequence
from flagscale.megatron.paired_layers import (
    AttentionPair,
    Pair,
    PairedLayer,
    attention_pairs,
    hidden_pairs,
)
from flagscale.megatron.pipeline_cargo import Cargo, Key, cargo_of, key_of, leaving
from flagscale.post_training.attention_relations import positions_of, relation_loss
from flagscale.post_training.hidden_states import hidden_loss, projection_of
from flagscale.post_training.layer_outputs import LayerOutputs
from flagscale.post_training.pipeline_columns import from_columns, to_columns
from flagscale.recipe import DistillationRecipe

if TYPE_CHECKING:
    from flagscale.post_training.upstream import mtd

Outputs = dict[Key, torch.Tensor]
Sum = Callable[[tuple[torch.Tensor, bool, bool]], torch.Tensor]


class IntermediateTerms(torch.nn.Module):
    """One stage's part of the terms: what it watches, computes, projects and passes on."""

    def __init__(
        self, student: GPTModel, teacher: GPTModel, distillation: DistillationRecipe, seed: int
    ) -> None:
        """Find the layers, watch those of this stage, and make the projections that train here.

        Args:
            student: this pipeline stage's part; so is the teacher.
            teacher: what the student is held to.
            distillation: the recipe's section.
            seed: of the projections: each is the same on every layout.

        Raises:
            UserError: a layer does not exist, or its output cannot be compared.
            ValueError: a layer does nothing in this implementation of it.
        """
        super().__init__()
        config, stages = student.config, parallel_state.get_pipeline_model_parallel_world_size()
        self._config, self._distillation = config, distillation
        self._stage = parallel_state.get_pipeline_model_parallel_rank()
        self._is_last = self._stage == stages - 1
        self._tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
        self._hidden = hidden_pairs(distillation, config, teacher.config, stages)
        self._attention = attention_pairs(distillation, config, teacher.config, stages)
        self._pairs: list[Pair] = [*self._hidden, *self._attention]
        self._cargo = cargo_of(
            self._pairs,
            stages,
            (config.pipeline_dtype or config.params_dtype).itemsize,
            self._tensor_ranks,
            sequence_parallel=config.sequence_parallel,
        )
        self.projections = torch.nn.ModuleDict(
            {
                str(pair.number): projection_of(student, pair, seed + pair.number)
                for pair in self._hidden
                if pair.stage == self._stage and pair.needs_projection
            }
        )
        models = {"student": student, "teacher": teacher}
        self.layers = LayerOutputs(self._pairs, models, self._stage)
        self._arrived: Outputs = {}
        self._losses: dict[str, torch.Tensor] = {}

    @property
    def columns(self) -> tuple[int, int]:
        """How many more this stage receives, and how many more it passes on."""
        return _columns(self._arriving), _columns(self._leaving)

    def receive(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Take from what the stage before has passed on what is not the models' own."""
        if tensor is None or not self._arriving:
            return tensor
        widths = [cargo.columns for cargo in self._arriving]
        own, *parts = tensor.split([tensor.size(-1) - sum(widths), *widths], dim=-1)
        self._arrived = {c.key: part for c, part in zip(self._arriving, parts, strict=True)}
        return own

    def pass_on(self, output: torch.Tensor, packed: PackedSeqParams | None) -> torch.Tensor:
        """Compute the stage's terms, and add to its output what a later stage needs.

        Args:
            output: of both models' forward pass, ModelOpt's: hidden states [s, b, both widths], or
                the LM loss on the last stage, which stays as it is.
            packed: where documents begin and end, if they do not see one another.

        Raises:
            RuntimeError: a student's layer was run without its gradient.
        """
        here, arrived, self._arrived = self.layers.take(), self._arrived, {}

        def side(who: str, layer: PairedLayer) -> torch.Tensor:
            key = key_of(who, layer)
            found = here[key] if key in here else self._unloaded(arrived[key], layer)
            return found if who == "student" else found.detach()

        losses = {
            pair.name: self._loss(pair, side, packed)
            for pair in self._pairs
            if pair.stage == self._stage
        }
        if self._is_last:
            self._losses = {
                pair.name: losses[pair.name]
                if pair.name in losses
                else from_columns(arrived["loss", pair.name, ""])
                for pair in self._pairs
            }
            return output
        loaded = {
            key_of(who, layer): self._loaded(here[key_of(who, layer)], layer)
            for pair in self._pairs
            for who, layer in pair.layers
            if key_of(who, layer) in here
        }
        columns = {("loss", name, ""): to_columns(v, output.dtype) for name, v in losses.items()}
        all_there = {**arrived, **loaded, **columns}
        more = [all_there[cargo.key].to(output.dtype) for cargo in self._leaving]
        return torch.cat([output, *more], dim=-1) if more else output

    def summed(
        self, masked_sum: Sum, zero: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """On the last stage, after a forward pass: the terms over the unmasked tokens.

        Args:
            masked_sum: of ModelOpt's triple: losses [b, s], whether they are to be added up over
                tensor-parallel ranks, whether these split the sequence.
            zero: what there is without terms.

        Returns:
            The weighted sum of all terms, and what is to be reported, unweighted: the mean of those
            of a kind, and each if there are several.
        """
        losses, self._losses = self._losses, {}
        sums = {
            name: masked_sum((loss_sb.transpose(0, 1), False, self._config.sequence_parallel))
            for name, loss_sb in losses.items()
        }
        hidden, attention = (
            torch.stack([sums[pair.name] for pair in pairs]).mean() if pairs else zero
            for pairs in (self._hidden, self._attention)
        )
        scales = self._distillation
        weighted = scales.intermediate_loss_scale * hidden + scales.attention_loss_scale * attention
        reported = {}
        if self._hidden:
            reported["intermediate distillation loss"] = hidden
        if self._attention:
            reported["attention distillation loss"] = attention
        return weighted, reported | (sums if len(sums) > 1 else {})

    @property
    def _arriving(self) -> list[Cargo]:
        return leaving(self._cargo, self._stage - 1)

    @property
    def _leaving(self) -> list[Cargo]:
        return leaving(self._cargo, self._stage)

    def _loss(
        self,
        pair: Pair,
        side: Callable[[str, PairedLayer], torch.Tensor],
        packed: PackedSeqParams | None,
    ) -> torch.Tensor:
        """[s, b] of one pair, float32; of this rank's positions, as hidden states are."""
        ours, theirs = (
            {layer.part: side(who, layer) for who, layer in pair.layers if who == whose}
            for whose in ("student", "teacher")
        )
        if self.training and torch.is_grad_enabled():
            _check_gradient(pair, ours.values())
        if isinstance(pair, AttentionPair):
            return self._attention_loss(pair, ours, theirs, packed)
        projections: dict[str, Any] = dict(self.projections.items())
        projection = projections.get(str(pair.number))
        return hidden_loss(pair, ours["output"], theirs["output"], projection)

    def _attention_loss(
        self,
        pair: AttentionPair,
        student: dict[str, torch.Tensor],
        teacher: dict[str, torch.Tensor],
        packed: PackedSeqParams | None,
    ) -> torch.Tensor:
        recipe = self._distillation
        heads = recipe.attention_relation_heads or self._config.num_attention_heads
        rows = next(iter(student.values())).size(0)
        context = parallel_state.get_context_parallel_group()
        in_order = {} if context.size() == 1 else {"whole": lambda x: whole_sequence(x, context)}
        loss_sb = relation_loss(
            student,
            teacher,
            recipe.attention_relations,
            heads // self._tensor_ranks,
            pair.fit,
            positions_of(rows, context, packed),
            **in_order,
        )
        # Each tensor-parallel rank has some heads, of all positions. Megatron-Core adds up in
        # place, and of what is not contiguous a copy, which it then forgets.
        loss_sb = (loss_sb / heads).contiguous()
        summed: torch.Tensor = (
            reduce_scatter_to_sequence_parallel_region(loss_sb)
            if self._config.sequence_parallel
            else reduce_from_tensor_model_parallel_region(loss_sb)
        )
        return summed

    def _loaded(self, part_sbc: torch.Tensor, layer: PairedLayer) -> torch.Tensor:
        """As columns beside hidden states, which may have this rank's share of the positions.

        All positions' channels of one rank are then as many positions less, and channels more.
        """
        if not (layer.is_split and self._config.sequence_parallel):
            return part_sbc
        shares = part_sbc.unflatten(0, (self._tensor_ranks, -1))
        return shares.permute(1, 2, 0, 3).flatten(2)

    def _unloaded(self, columns: torch.Tensor, layer: PairedLayer) -> torch.Tensor:
        """What `_loaded` was given, on another stage."""
        if not (layer.is_split and self._config.sequence_parallel):
            return columns
        shares = columns.unflatten(-1, (self._tensor_ranks, -1))
        return shares.permute(2, 0, 1, 3).flatten(0, 1)


def attach(terms: IntermediateTerms, model: mtd.DistillationModel) -> None:
    """Let a distillation model compute the terms with its forward pass, and train what they train.

    Args:
        terms: of both models.
        model: adapted to Megatron-Core by ModelOpt; ModelOpt's export takes the terms off again.
    """
    # Where ModelOpt has what a loss trains: seen by DDP, optimiser and training checkpoints, and
    # no part of the student.
    model.loss_modules.append(terms.to(next(model.parameters()).device))
    model._hook_handles.update(terms.layers.handles)
    forward, set_input_tensor = model.forward, model.set_input_tensor

    def with_terms(self: GPTModel, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        with terms.layers.watching():
            output = forward(*args, **kwargs)
        return terms.pass_on(output, kwargs.get("packed_seq_params"))

    def set_own_input(self: GPTModel, input_tensors: list[torch.Tensor | None]) -> None:
        set_input_tensor([terms.receive(tensor) for tensor in input_tensors])

    model.forward = MethodType(with_terms, model)
    model.set_input_tensor = MethodType(set_own_input, model)


def intermediate_terms(model: mtd.DistillationModel) -> IntermediateTerms:
    """Those that were attached to a model."""
    found: IntermediateTerms = next(
        module for module in model.loss_modules if isinstance(module, IntermediateTerms)
    )
    return found


def _check_gradient(pair: Pair, outputs: Iterable[torch.Tensor]) -> None:
    """The recipe refuses what is known to forget; this is for what is not known to."""
    if not all(output.requires_grad for output in outputs):
        raise RuntimeError(
            f"{pair.name}: the student's part has no gradient, because it is computed again in the "
            "backward pass; set training.recompute_granularity=none"
        )


def _columns(cargo: list[Cargo]) -> int:
    return sum(one.columns for one in cargo)
