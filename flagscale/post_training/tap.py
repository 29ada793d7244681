"""What one micro-batch's loss is made of, caught on its way, and what training says of it.

Nothing here takes part in the computation of a loss: hooks see what the output layers are given,
and a wrapped `forward_step` what comes out. So what an audit recomputes depends on no code of the
losses, and holds whether logits are made as a whole, in chunks, or never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model

from flagscale.post_training.sparse_targets import GivenTargets, SparseRows
from flagscale.recipe.layer_pairs import layer_of

# Changes what an output layer is given: (whose, hidden states [s, b, h]) -> hidden states.
Edit = Callable[[str, torch.Tensor], torch.Tensor]
STUDENT, TEACHER = "student", "teacher"
# Whose, the module's name over the whole model, and `output` or one of `_INPUTS`.
Layer = tuple[str, str, str]
_INPUTS = ("query", "key", "value")  # of core attention, in its order
_COLUMNS = 4096  # of an output layer that are widened to float64 at a time


@dataclass
class Head:
    """An output layer with what it was given.

    Attributes:
        hidden_sbh: hidden states of this rank, [s, b, h] or with sequence parallelism [s / TP, b,
            h].
        weight_vh: this rank's slice of the padded vocabulary.
        vocab_size: tokens; what the weight has beyond is padding.
        group: the ranks that share the vocabulary.
        is_split: whether they share the sequence too.
        gradient_sbh: of the loss in the hidden states, where it was asked for.
    """

    hidden_sbh: torch.Tensor
    weight_vh: torch.Tensor
    vocab_size: int
    group: torch.distributed.ProcessGroup
    is_split: bool
    gradient_sbh: torch.Tensor | None = None

    def rows(self) -> torch.Tensor:
        """[b * s, h] in the order of a [b, s] batch. All ranks of `group` call it."""
        return self.whole(self.hidden_sbh.detach())

    def gradient(self) -> torch.Tensor:
        """float64 [b * s, h], of `gradient_sbh`."""
        assert self.gradient_sbh is not None, "the tap differentiates"
        return self.whole(self.gradient_sbh).double()

    def whole(self, states_sbh: torch.Tensor) -> torch.Tensor:
        """[b * s, h] of what is laid out as the hidden states are."""
        if self.is_split:
            states_sbh = gather_from_sequence_parallel_region(states_sbh, group=self.group)
        return states_sbh.transpose(0, 1).flatten(0, 1)

    @property
    def dtype(self) -> torch.dtype:
        """That the model computes its logits in."""
        return self.weight_vh.dtype

    def logits(self, rows_nh: torch.Tensor) -> torch.Tensor:
        """float64 [n, vocabulary], whole on every rank of `group`. All of them call it.

        Args:
            rows_nh: some of `rows`, in any dtype; gradients pass where the vocabulary is not split.
        """
        rows_nh = rows_nh.double()
        parts = [rows_nh @ part.double().T for part in self.weight_vh.detach().split(_COLUMNS)]
        logits_nv = torch.cat(parts, dim=-1)
        if self.group.size() > 1:
            gathered = [torch.empty_like(logits_nv) for _ in range(self.group.size())]
            torch.distributed.all_gather(gathered, logits_nv, group=self.group)
            logits_nv = torch.cat(gathered, dim=-1)
        return logits_nv[:, : self.vocab_size]


@dataclass
class Seen:
    """One micro-batch's loss on a rank of the last pipeline stage.

    Attributes:
        tokens_bs: that the model was given.
        labels_bs: the token after each.
        mask_bs: 0 where there is no loss.
        positions_bs: of each token in its document.
        heads: of `student` and `teacher`; of the student alone where nothing is distilled, or the
            teacher gives no logits.
        targets: b * s rows, what it gives then.
        report: name of a loss -> its sum and its count, as training reports them.
        loss: what training takes the gradient of, summed over the tokens.
        num_tokens: what it divides that by.
        is_sum: whether gradients are summed over micro-batches and ranks, and divided by all their
            tokens at once (Megatron's `calculate_per_token_loss`), not a mean of means.
        is_packed: whether documents do not see one another.
    """

    tokens_bs: torch.Tensor
    labels_bs: torch.Tensor
    mask_bs: torch.Tensor
    positions_bs: torch.Tensor
    heads: dict[str, Head]
    targets: SparseRows | None = None
    report: dict[str, tuple[float, float]] = field(default_factory=dict)
    loss: float = 0.0
    num_tokens: float = 0.0
    is_sum: bool = True
    is_packed: bool = False


class Tap:
    """Catches the next micro-batch that a model computes the loss of.

    Args:
        model: this rank's part, wrapped or not, plain or converted for distillation.
        edit: see `Edit`.
        differentiates: find the gradient in the student's last hidden states too. The model's body
            then has no part in the loss.
        layers: which are kept too, where this pipeline stage has them.

    Attributes:
        seen: what was caught, on the last pipeline stage.
        layers: of this stage, on every one: outputs [s, b, h], inputs of core attention [s, b,
            heads, channels], both of this rank.
    """

    def __init__(
        self,
        model: GPTModel,
        edit: Edit | None = None,
        *,
        differentiates: bool = False,
        layers: Sequence[Layer] = (),
    ) -> None:
        self._model = unwrap_model(model)
        self._edit = edit
        self._differentiates = differentiates
        self._given: dict[str, Any] = {}
        self._heads: dict[str, Head] = {}
        self._targets: SparseRows | None = None
        self._wanted = layers
        self.layers: dict[Layer, torch.Tensor] = {}
        self.seen: Seen | None = None

    @contextmanager
    def open(self) -> Iterator[Tap]:
        """Look while the body runs; `seen` stays None but on the last pipeline stage."""
        models = {STUDENT: self._model}
        if hasattr(self._model, "teacher_model"):
            models[TEACHER] = self._model.teacher_model
        hooks = [self._model.register_forward_pre_hook(self._batch, with_kwargs=True)]
        for whose, model in models.items():
            if not model.post_process:
                continue
            layer = model.output_layer
            if isinstance(layer, GivenTargets):
                hooks.append(layer.register_forward_pre_hook(self._given_targets))
            else:
                hook = partial(self._head, whose, model)
                hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for wanted in self._wanted:
            module = _on_this_stage(models[wanted[0]], wanted[1])
            if module is not None:
                hooks.append(module.register_forward_hook(partial(self._layer, wanted)))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def around(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """The same step, of whose first micro-batch the loss is seen too."""

        def step(*args: Any, **named: Any) -> tuple[Any, Callable[..., Any]]:  # noqa: ANN401
            output, loss_func = forward_step(*args, **named)
            return output, partial(self._loss, loss_func)

        return step

    def _loss(self, loss_func: Callable[..., Any], output: Any) -> Any:  # noqa: ANN401
        result = loss_func(output)
        if self.seen is None and self._given:
            loss, num_tokens, report = result
            if self._differentiates:
                head = self._heads[STUDENT]
                head.gradient_sbh = torch.autograd.grad(loss, head.hidden_sbh)[0]
            targets = self._targets
            if targets is not None:
                targets = targets.by_sample(len(self._given["mask_bs"]))
            sums = torch.stack([torch.stack([*one]) for one in report.values()]).tolist()
            self.seen = Seen(
                **self._given,
                heads=self._heads,
                targets=targets,
                report={name: (s, n) for name, (s, n) in zip(report, sums, strict=True)},
                loss=loss.item(),
                num_tokens=num_tokens.item(),
                is_sum=bool(self._model.config.calculate_per_token_loss),
            )
        return result

    def _layer(self, layer: Layer, _module: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401
        if layer in self.layers:  # of the first micro-batch, and not of what is computed again
            return
        if layer[2] in _INPUTS:
            tensor, dimensions = inputs[_INPUTS.index(layer[2])], 4
        else:  # some return a bias too
            tensor, dimensions = output[0] if isinstance(output, tuple) else output, 3
        # Of packed documents attention has no dimension for sequences.
        self.layers[layer] = (
            tensor if tensor.dim() == dimensions else tensor.unsqueeze(1)
        ).detach()

    def _batch(self, _model: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ANN401
        if self.seen is None and self._model.post_process:
            self._given = {
                "tokens_bs": args[0],
                "positions_bs": args[1],
                "labels_bs": named["labels"],
                "mask_bs": named["loss_mask"],
                "is_packed": named.get("packed_seq_params") is not None,
            }

    def _given_targets(self, _layer: Any, args: tuple[SparseRows, ...]) -> None:  # noqa: ANN401
        if self.seen is None:
            self._targets = args[0]

    def _head(
        self,
        whose: str,
        model: GPTModel,
        layer: Any,  # noqa: ANN401
        args: tuple[Any, ...],
        named: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.seen is not None:
            return None
        hidden_sbh = args[0]
        if self._edit is not None:
            hidden_sbh = self._edit(whose, hidden_sbh.detach())
        kept_sbh = hidden_sbh if whose == TEACHER else hidden_sbh.detach()  # the graph is not kept
        if self._differentiates and whose == STUDENT:
            hidden_sbh = kept_sbh = kept_sbh.requires_grad_(True)
        weight = named.get("weight")
        # Of several calls, with multi-token prediction, the last is the model's own.
        self._heads[whose] = Head(
            kept_sbh,
            layer.weight if weight is None else weight,
            model.unpadded_vocab_size,
            layer.tp_group,
            layer.sequence_parallel,
        )
        return (hidden_sbh, *args[1:]), named


def _on_this_stage(model: GPTModel, name: str) -> torch.nn.Module | None:
    """A module by its name in the whole model, where layers count from 0; None on other stages."""
    layer = layer_of(name)
    if layer is None:
        has_it = model.pre_process if name == "embedding" else model.post_process
        return model.get_submodule(name) if has_it else None
    for found in model.decoder.layers:
        if found.layer_number == layer[0] + 1:
            inside: torch.nn.Module = found.get_submodule(layer[1])
            return inside
    return None
