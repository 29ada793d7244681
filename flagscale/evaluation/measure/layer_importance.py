"""Which layers a model can best do without, measured on calibration text.

Two criteria. `kl`: layers go one by one, each time the one without which the model stays closest
to the whole one, by KL(whole || cut) of the predicted tokens; what a layer is worth depends on
which others are gone. `block_influence` (ShortGPT, arXiv 2403.03853): one minus the cosine between
what goes into a layer and what comes out, all in one forward pass of the whole model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import is_pipeline_last_stage

from flagscale.evaluation.fidelity import FIGURES
from flagscale.evaluation.measure.token_figures import token_figures
from flagscale.megatron import platform
from flagscale.models.causal_lm import OutputLayer
from flagscale.models.layer_runs import LayerRuns, block_influence
from flagscale.models.megatron import from_last_stage

logger = logging.getLogger(__name__)

_KL, _AGREEMENT = FIGURES.index("kl"), FIGURES.index("top1_agreement")
_PROGRESS_SECONDS = 5.0
_LOOKED_AGAIN = 2  # models for each layer after the first, before any of them is gone
# Logits of one model that are held at once; see `flagscale.evaluation.measure.measuring`.
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
_HELD_CHUNKS = 4

# KL and agreement of models with fewer layers, by those that are gone, the last one last.
Measured = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Removal:
    """A layer that goes, after those before it.

    Attributes:
        layer: of the teacher, from 0.
        kl: KL(whole || cut) without it and those before, nats a token.
        top1_agreement: share of tokens where both say the same next token.
    """

    layer: int
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class LayerImportance:
    """What was measured.

    Attributes:
        criterion: `kl` or `block_influence`.
        scores: of each layer by itself, from 0: the KL without it, nats a token, or its block
            influence.
        removals: in order.
        tokens: that were measured on.
    """

    criterion: str
    scores: tuple[float, ...]
    removals: tuple[Removal, ...]
    tokens: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that stay, from 0."""
        gone = {removal.layer for removal in self.removals}
        return tuple(layer for layer in range(len(self.scores)) if layer not in gone)


class _Text:
    """The calibration text, the whole model's predictions of it, and models with fewer layers."""

    def __init__(
        self,
        model: GPTModel,
        batches: Sequence[dict[str, torch.Tensor]],
        known: Measured,
        tell: Callable[[Measured], object],
    ) -> None:
        self._output_layer = OutputLayer(model) if is_pipeline_last_stage() else None
        self._runs = [LayerRuns(model, batch["tokens"]) for batch in batches]
        self._masks = [batch["loss_mask"].reshape(-1).bool() for batch in batches]
        self._labels = [batch["labels"].reshape(-1) for batch in batches]
        self.tokens = sum(int(mask.sum()) for mask in self._masks)
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._all = frozenset(range(model.config.num_layers))
        self._held: Sequence[int] = sorted(self._all)
        self._known, self._tell = dict(known), tell

    def without(self, layer: int, kept: Sequence[int]) -> tuple[float, float]:
        """KL and agreement, means over the tokens with a loss, the same on every rank.

        Of a model of the layers `kept` but for one; what is known is not measured again.
        """
        key = " ".join(map(str, [*sorted(self._all.difference(kept)), layer]))
        if key not in self._known:
            if len(kept) < len(self._held):
                for run in self._runs:
                    run.keep(kept)
                self._held = tuple(kept)
            self._known[key] = self._measure(layer, kept)
            self._tell(self._known)
        kl, agreement = self._known[key]
        return kl, agreement

    def _measure(self, layer: int, kept: Sequence[int]) -> tuple[float, float]:
        sums = torch.zeros(2, dtype=torch.float64, device=platform.device())
        for batch, run in enumerate(self._runs):
            cut_sbh = run.without(layer, kept)
            if cut_sbh is not None and run.whole_sbh is not None:
                sums += self._sums(batch, run.whole_sbh, cut_sbh)
        kl, agreement = (from_last_stage(sums) / self.tokens).tolist()
        return kl, agreement

    def _sums(self, batch: int, whole_sbh: torch.Tensor, cut_sbh: torch.Tensor) -> torch.Tensor:
        layer = self._output_layer
        assert layer is not None, "of the last stage, which has these"
        mask_n = self._masks[batch].to(whole_sbh.device)
        rows = max(1, _CHUNK_ELEMENTS[whole_sbh.device.type] // layer.size)
        whole_nh, cut_nh = (x.transpose(0, 1).flatten(0, 1)[mask_n] for x in (whole_sbh, cut_sbh))
        labels_n = self._labels[batch].to(whole_sbh.device)[mask_n]
        sums = torch.zeros(2, dtype=torch.float64, device=whole_sbh.device)
        predicted = self._predicted(batch, layer, whole_nh, rows)
        for whole_nv, cut, labels in zip(
            predicted, cut_nh.split(rows), labels_n.split(rows), strict=True
        ):
            figures_mfn = token_figures(
                whole_nv, layer(cut), labels, layer.first_token, layer.group
            )
            sums += figures_mfn[1, [_KL, _AGREEMENT]].sum(dim=-1)
        return sums

    def _predicted(
        self, batch: int, layer: OutputLayer, whole_nh: torch.Tensor, rows: int
    ) -> Iterable[torch.Tensor]:
        """The whole model's logits, `rows` at a time; of little text they are held."""
        chunks = (layer(chunk) for chunk in whole_nh.split(rows))
        if self.tokens * layer.size > _HELD_CHUNKS * _CHUNK_ELEMENTS[whole_nh.device.type]:
            return chunks
        if batch not in self._kept:
            self._kept[batch] = list(chunks)
        return self._kept[batch]


class _Progress:
    """A line for each layer that goes, and one every few seconds, with the time left."""

    def __init__(self, layers: int, count: int) -> None:
        self._layers, self._count, self._removed, self._looked = layers, count, 0, 0
        self._start = self._last = time.monotonic()

    def looked(self, found: Removal) -> None:
        """One model has been measured."""
        self._looked += 1
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS:
            return
        self._last, spent = now, now - self._start
        logger.info(
            "layer importance: %d models measured, %d of %d layers gone, about %.0f s left",
            self._looked,
            self._removed,
            self._count,
            spent / self._looked * self._left(),
        )

    def removed(self, removal: Removal) -> None:
        """A layer has been chosen."""
        self._removed += 1
        logger.info(
            "without layer %d: %d layers, KL %.3f nats a token, top-1 agreement %.1f%%",
            removal.layer,
            self._layers - self._removed,
            removal.kl,
            100 * removal.top1_agreement,
        )

    def _left(self) -> float:
        """Models: all in the first round, then as many for each layer as there were so far."""
        first = max(0, self._layers - self._looked)
        rounds = max(0, self._removed - 1)
        each = (self._looked - self._layers) / rounds if rounds else _LOOKED_AGAIN
        return first + each * (self._count - max(1, self._removed))


def measure_importance(
    model: GPTModel,
    batches: Sequence[dict[str, torch.Tensor]],
    criterion: str,
    count: int,
    known: Measured | None = None,
    tell: Callable[[Measured], object] = lambda known: None,
) -> LayerImportance:
    """Find the layers that a model can best do without. All ranks call it.

    Args:
        model: from `load_model`, not wrapped.
        batches: calibration text: micro-batches of the data loader, the same on every rank.
        criterion: `kl` or `block_influence`.
        count: layers to remove, fewer than the model has.
        known: what an earlier attempt has told of the same model and text, the same on every rank.
        tell: is given all that is known, after each model that was measured.
    """
    layers = model.config.num_layers
    with torch.inference_mode():
        text = _Text(model, batches, known or {}, tell)
        progress = _Progress(layers, count)
        if criterion == "kl":
            scores, removals = _greedy(text, layers, count, progress)
        else:
            scores = _influence(model, batches)
            order = sorted(range(layers), key=scores.__getitem__)[:count]
            removals = _in_order(text, layers, order, progress)
    return LayerImportance(criterion, tuple(scores), tuple(removals), text.tokens)


def _greedy(
    text: _Text, layers: int, count: int, progress: _Progress
) -> tuple[list[float], list[Removal]]:
    """Layer after layer, the one that costs least.

    What a layer costs rises as others go: one that cost more the last time it was looked at than
    the best of this round costs now is not looked at again (Minoux' accelerated greedy, 1978).
    """
    kept, removals, now = list(range(layers)), list[Removal](), 0.0
    costs: dict[int, float] = {}
    scores: list[float] = []
    for _ in range(count):
        best: Removal | None = None
        for layer in sorted(kept, key=lambda layer: costs.get(layer, 0.0)):
            if best is not None and now + costs.get(layer, 0.0) >= best.kl:
                break
            found = Removal(layer, *text.without(layer, kept))
            progress.looked(found)
            costs[layer] = found.kl - now
            if best is None or found.kl < best.kl:
                best = found
        assert best is not None, "fewer layers go than there are"
        scores = scores or [costs[layer] for layer in kept]
        removals.append(best)
        now = best.kl
        kept.remove(best.layer)
        progress.removed(best)
    return scores, removals


def _in_order(text: _Text, layers: int, order: Sequence[int], progress: _Progress) -> list[Removal]:
    """What becomes of the model as these layers go."""
    kept, removals = list(range(layers)), []
    for layer in order:
        removals.append(Removal(layer, *text.without(layer, kept)))
        kept.remove(layer)
        progress.removed(removals[-1])
    return removals


def _influence(model: GPTModel, batches: Sequence[dict[str, torch.Tensor]]) -> list[float]:
    """Means over the tokens with a loss."""
    sums = torch.zeros(model.config.num_layers, dtype=torch.float64)
    tokens = 0
    for batch in batches:
        mask_bs = batch["loss_mask"].bool().cpu()
        tokens += int(mask_bs.sum())
        for layer, influence_bs in block_influence(model, batch["tokens"]).items():
            sums[layer] += influence_bs[mask_bs].sum()
    return (sums / tokens).tolist()
