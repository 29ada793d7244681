"""How fast a model writes, and how much memory it takes meanwhile, on the machine at hand.

Reading the prompt (prefill) is bound by computation, writing on (decode) by memory: they are
measured apart.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flagscale.evaluation.generation.generate import Model
from flagscale.evaluation.generation.speed import Speed
from flagscale.megatron import platform
from flagscale.megatron.peak_memory import measure_peak_anew, peak_since

_REPEATS = 3
_WARM_UP_TOKENS = 3


class TransformersModel:
    """A model of transformers' that says which token comes next."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap it."""
        self._model = model

    def new_cache(self, batch_size: int, length: int) -> Any:  # noqa: ANN401 - transformers'
        """An empty cache of keys and values; it grows."""
        del batch_size, length
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def next_tokens(
        self,
        tokens_bs: torch.Tensor,
        last_b: list[int],
        cache: Any | None = None,  # noqa: ANN401
    ) -> list[int]:
        """The most probable token behind the last of each text, see `Model`."""
        assert set(last_b) == {tokens_bs.size(1) - 1}, "texts of one length"
        output = self._model(
            input_ids=tokens_bs.to(self._model.device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        found: list[int] = output.logits[:, -1].argmax(-1).tolist()
        return found


def measure_generation(
    model: Model, engine: str, dtype: torch.dtype, prompt: Sequence[int], new_tokens: int
) -> Speed:
    """Write on from a prompt, a little to warm up and then some times: the median counts.

    All ranks call it. One text at a time, as one who waits for an answer has it.

    Args:
        model: that is measured.
        engine: what runs it.
        dtype: that it computes in.
        prompt: token ids.
        new_tokens: to write, at least 2.
    """
    measure_peak_anew()
    _once(model, prompt, min(_WARM_UP_TOKENS, new_tokens))
    seconds = [_once(model, prompt, new_tokens) for _ in range(_REPEATS)]
    prefill, decode = (statistics.median(times) for times in zip(*seconds, strict=True))
    return Speed(
        engine=engine,
        device=platform.device().type,
        dtype=str(dtype).removeprefix("torch."),
        prompt_tokens=len(prompt),
        new_tokens=new_tokens,
        prefill_tokens_per_second=len(prompt) / prefill,
        decode_tokens_per_second=(new_tokens - 1) / decode,
        peak_memory=peak_since(),
    )


@torch.inference_mode()
def _once(model: Model, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token was there, and from then until the last."""
    begin = time.perf_counter()
    cache = model.new_cache(1, len(prompt) + new_tokens)
    text = list(prompt)
    text += model.next_tokens(torch.tensor([text]), [len(text) - 1], cache)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        seen = text if cache is None else text[-1:]
        text += model.next_tokens(torch.tensor([seen]), [len(seen) - 1], cache)
    return first - begin, time.perf_counter() - first


def measure_with_vllm(folder: Path, prompt: Sequence[int], new_tokens: int) -> Speed | None:
    """The same by vLLM, where it is installed and there is an accelerator; else None.

    Args:
        folder: of a Hugging Face model.
        prompt: token ids.
        new_tokens: to write.
    """
    if not platform.HAS_GPU or importlib.util.find_spec("vllm") is None:
        return None
    from vllm import LLM, SamplingParams

    longest = len(prompt) + new_tokens
    # No prefix is kept: each repetition reads the prompt.
    model = LLM(str(folder), max_model_len=longest, enable_prefix_caching=False)

    def seconds(tokens: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens)
        begin = time.perf_counter()
        model.generate([{"prompt_token_ids": list(prompt)}], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(new_tokens)
    prefill = statistics.median(seconds(1) for _ in range(_REPEATS))
    whole = statistics.median(seconds(new_tokens) for _ in range(_REPEATS))
    return Speed(
        engine="vllm",
        device="cuda",
        dtype=str(model.llm_engine.model_config.dtype).removeprefix("torch."),
        prompt_tokens=len(prompt),
        new_tokens=new_tokens,
        prefill_tokens_per_second=len(prompt) / prefill,
        decode_tokens_per_second=(new_tokens - 1) / max(whole - prefill, 1e-9),
        peak_memory=None,  # vLLM takes a share of the memory, whatever the model needs
    )
