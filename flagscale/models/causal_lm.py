"""A Megatron-Core model in two halves, on any layout: hidden states, and the vocabulary.

Predictions over a vocabulary are large: 200 to 600 kB a token. What they are computed from is
small, 2 to 32 kB, and with the output layer says the same. So a model's predictions can be kept,
and compared with another model's, when it has made room for that one.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import is_pipeline_last_stage
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from flagscale.megatron import platform
from flagscale.models.megatron import from_last_stage, hidden_states


class OutputLayer:
    """A model's output layer alone, which outlives the model.

    Attributes:
        group: the ranks that share the vocabulary.
        first_token: of this rank's slice of it.
        size: tokens in the slice.
    """

    def __init__(self, model: GPTModel) -> None:
        """Take it, and the embedding where that is its weight.

        Args:
            model: not wrapped; its last pipeline stage.
        """
        self._layer = model.output_layer
        self._weight = (
            model.shared_embedding_or_output_weight()
            if model.share_embeddings_and_output_weights
            else None
        )
        self.group: torch.distributed.ProcessGroup = self._layer.tp_group
        self.size: int = self._layer.output_size_per_partition
        self.first_token = self.group.rank() * self.size

    def __call__(self, hidden_nh: torch.Tensor) -> torch.Tensor:
        """Logits [n, padded vocabulary / TP], this rank's slice, in the model's dtype."""
        logits_n1v, _ = self._layer(hidden_nh.unsqueeze(1), weight=self._weight)
        logits_nv: torch.Tensor = logits_n1v.squeeze(1)
        return logits_nv


class CausalLM:
    """A model that is run, but not trained.

    Attributes:
        output_layer: on ranks of the last pipeline stage; None elsewhere.
    """

    def __init__(self, model: GPTModel, *, can_cache: bool) -> None:
        """Split it.

        Args:
            model: from `load_model`, not wrapped.
            can_cache: whether its layers keep keys and values in Megatron-Core's inference context.
        """
        self._model = model
        self._can_cache = can_cache
        self._vocab_size: int = model.unpadded_vocab_size
        self.output_layer = OutputLayer(model) if is_pipeline_last_stage() else None

    def hidden_states(self, tokens_bs: torch.Tensor) -> torch.Tensor | None:
        """Hidden states [b, s, h] on ranks of the last pipeline stage, None elsewhere.

        All ranks call it, with the same int64 tokens.
        """
        hidden_sbh = hidden_states(self._model, tokens_bs)
        return None if hidden_sbh is None else hidden_sbh.transpose(0, 1)

    def logits(self, tokens_bs: torch.Tensor, count: int) -> torch.Tensor:
        """What the model predicts after each text's last positions. All ranks call it.

        Args:
            tokens_bs: int64, the same on every rank.
            count: of positions, from the end.

        Returns:
            float32 [b, count, vocabulary], whole and on every rank, without padded columns.
        """
        hidden_bsh = self.hidden_states(tokens_bs)
        shape = (tokens_bs.size(0), count, self._vocab_size)
        if hidden_bsh is not None and self.output_layer is not None:
            part_nv = self.output_layer(hidden_bsh[:, -count:].flatten(0, 1))
            whole_nv = gather_from_tensor_model_parallel_region(part_nv)
            logits_bkv = whole_nv[:, : self._vocab_size].float().view(shape)
        else:
            logits_bkv = torch.empty(shape, device=platform.device())
        return from_last_stage(logits_bkv)

    def new_cache(self, batch_size: int, length: int) -> StaticInferenceContext | None:
        """Room for keys and values, for `next_tokens`; None where the model cannot use it.

        Args:
            batch_size: texts.
            length: tokens of each, at most.
        """
        return StaticInferenceContext(batch_size, length) if self._can_cache else None

    def next_tokens(
        self,
        tokens_bs: torch.Tensor,
        last_b: list[int],
        cache: StaticInferenceContext | None = None,
    ) -> list[int]:
        """The most probable token after a position of each text. All ranks call it.

        Args:
            tokens_bs: int64, the same on every rank; right-padded.
            last_b: the position in `tokens_bs`, one a text.
            cache: from `new_cache`, which has seen all tokens before these; then they are added.

        Returns:
            One token a text, the same on every rank. Of equally probable ones the first.
        """
        hidden_sbh = hidden_states(self._model, tokens_bs, cache)
        if cache is not None:
            cache.increment_sequence_len_offset(tokens_bs.size(1))
        chosen_b = torch.zeros(len(last_b), dtype=torch.int64, device=platform.device())
        if hidden_sbh is not None and self.output_layer is not None:
            rows = torch.tensor(last_b, device=hidden_sbh.device)
            hidden_bh = hidden_sbh[rows, torch.arange(len(last_b), device=hidden_sbh.device)]
            chosen_b = _most_probable(self.output_layer(hidden_bh), self.output_layer)
        return from_last_stage(chosen_b).tolist()


def is_first_replica() -> bool:
    """Whether this rank is the first of those that compute the same hidden states."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )


def _most_probable(logits_bv: torch.Tensor, layer: OutputLayer) -> torch.Tensor:
    """int64 [b], of the whole vocabulary."""
    top_b, token_b = logits_bv.float().max(dim=-1)
    # Tokens are whole numbers that float64 holds.
    mine = torch.stack([top_b.double(), (token_b + layer.first_token).double()])
    parts = [torch.empty_like(mine) for _ in range(layer.group.size())]
    torch.distributed.all_gather(parts, mine, group=layer.group)
    tops_rb, tokens_rb = torch.stack(parts, dim=1)
    return tokens_rb.gather(0, tops_rb.argmax(0, keepdim=True)).squeeze(0).long()
