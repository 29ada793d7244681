"""How probable continuations are to a model, and no more: what lm-eval's multiple choices ask.

lm-eval's own `HFLM` reads the context again for each of a question's answers, predicts what comes
behind every token of it, and turns all that into log-probabilities. Here a context is read once and
its keys and values are kept for its answers; and the output layer is computed where an answer
counts. Figures are lm-eval's, to the rounding of the models' dtype.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

from flagscale.megatron.onednn import OneDnnLayers

Request = tuple[Any, list[int], list[int]]  # a key of lm-eval's, the context, the continuation
_NEEDED = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}


class _Text(NamedTuple):
    """What a model reads.

    Attributes:
        before: tokens of which no prediction counts.
        scored: the tokens behind them; what is predicted after each of them counts.
    """

    before: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of it."""
        return self.before + self.scored


class ScoringLM(HFLM):
    """transformers' model, as lm-eval asks it."""

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, and whether it is the most probable one."""
        asked: dict[_Text, list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            asked[self._text(context, continuation)].append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with (
            torch.inference_mode(),
            OneDnnLayers(),
            tqdm(
                total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
            ) as bar,
        ):
            for text, logits_nv in self._predictions(list(asked), override_bs or self.batch_size):
                scores_nv = torch.log_softmax(logits_nv, dim=-1, dtype=self.softmax_dtype)
                best_n = scores_nv.argmax(-1)
                for number in asked[text]:
                    key, _, continuation = requests[number]
                    wanted_n = torch.tensor(continuation, device=scores_nv.device)
                    found_n = scores_nv.gather(-1, wanted_n.unsqueeze(-1))
                    answers[number] = float(found_n.sum()), bool((best_n == wanted_n).all())
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[number])
                bar.update(len(asked[text]))
        return answers

    def _text(self, context: list[int], continuation: list[int]) -> _Text:
        """Cut from the left where the model sees less; a continuation's last token is not read."""
        tokens = (context + continuation)[-(self.max_length + 1) : -1]
        start = len(tokens) - len(continuation)
        assert start >= 0, "a continuation is longer than what the model sees"
        return _Text(tuple(tokens[:start]), tuple(tokens[start:]))

    def _predictions(
        self, texts: Sequence[_Text], batch_size: int
    ) -> Iterator[tuple[_Text, torch.Tensor]]:
        """Of each text, in another order, the logits [n, v] behind its n scored tokens."""
        families: dict[tuple[int, ...], list[_Text]] = defaultdict(list)
        alone: list[_Text] = []
        shares = self._can_share()
        for text in texts:
            (families[text.before] if shares and text.before else alone).append(text)
        together: list[_Text] = []
        for before in sorted(families, key=len, reverse=True):
            members = families[before]
            if len(members) == 1:
                alone += members
            else:
                together += members
        alone.sort(key=lambda text: len(text.tokens), reverse=True)
        for start in range(0, len(alone), batch_size):
            yield from self._read_whole(alone[start : start + batch_size])
        for start in range(0, len(together), batch_size):
            yield from self._read_shared(together[start : start + batch_size])

    def _read_whole(self, texts: Sequence[_Text]) -> Iterator[tuple[_Text, torch.Tensor]]:
        tokens_bs = self._padded([text.tokens for text in texts])
        length = tokens_bs.size(1)
        count = length - min(len(text.before) for text in texts)
        logits_bkv = self._last_logits(tokens_bs, count)
        for text, logits_kv in zip(texts, logits_bkv, strict=True):
            start = len(text.before) - (length - count)
            yield text, logits_kv[start : start + len(text.scored)]

    def _read_shared(self, texts: Sequence[_Text]) -> Iterator[tuple[_Text, torch.Tensor]]:
        """Every beginning once, then what is behind it; beginnings end at the same position."""
        beginnings = {text.before: None for text in texts}
        rows = {before: row for row, before in enumerate(beginnings)}
        longest = max(map(len, beginnings))
        before_as = self._padded([before[::-1] for before in beginnings]).flip(1)
        lengths_a = torch.tensor([len(before) for before in beginnings], device=self.device)
        places_s = torch.arange(longest, device=self.device)
        seen_as = (places_s >= longest - lengths_a.unsqueeze(1)).long()
        cache = DynamicCache(config=self.model.config)
        self.model(
            input_ids=before_as,
            attention_mask=seen_as,
            position_ids=(seen_as.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        row_b = torch.tensor([rows[text.before] for text in texts], device=self.device)
        cache.batch_select_indices(row_b)
        scored_bs = self._padded([text.scored for text in texts])
        ones_bs = torch.ones_like(scored_bs)
        logits_bsv = self.model(
            input_ids=scored_bs,
            attention_mask=torch.cat([seen_as[row_b], ones_bs], dim=1),
            position_ids=lengths_a[row_b].unsqueeze(1) + ones_bs.cumsum(1) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits
        for text, logits_sv in zip(texts, logits_bsv, strict=True):
            yield text, logits_sv[: len(text.scored)]

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """int64 [b, s], on the right with zeros as lm-eval does."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)

    def _last_logits(self, tokens_bs: torch.Tensor, count: int) -> torch.Tensor:
        """Logits [b, count, v] behind the last tokens of right-padded texts."""
        if "logits_to_keep" in inspect.signature(type(self.model).forward).parameters:
            logits_bkv: torch.Tensor = self.model(
                tokens_bs, use_cache=False, logits_to_keep=count
            ).logits
            return logits_bkv
        logits_bsv: torch.Tensor = self.model(tokens_bs).logits
        return logits_bsv[:, -count:]

    def _can_share(self) -> bool:
        """Whether each layer keeps keys and values of all tokens, and says so in transformers' way.

        Windows, chunks and recurrent states are not cut at a beginning's end.
        """
        if not inspect.signature(type(self.model).forward).parameters.keys() >= _NEEDED:
            return False
        layers = DynamicCache(config=self.model.config).layers
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
