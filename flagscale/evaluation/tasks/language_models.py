"""Models as lm-eval asks them: transformers', and those that Megatron-Core alone can compute."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flagscale.errors import UserError
from flagscale.evaluation.generation.generate import continuations
from flagscale.evaluation.tasks.scoring import ScoringLM
from flagscale.megatron import platform
from flagscale.models.causal_lm import CausalLM
from flagscale.models.reload_hf import is_quantized, whole


def of_folder(folder: Path, batch_size: int) -> ScoringLM:
    """A Hugging Face folder, as lm-eval's `--model hf` takes it.

    One in ModelOpt's FP8 computes what a server does: weights and inputs rounded to FP8. Where
    there are several accelerators, layers are spread over them.

    Args:
        folder: config, safetensors and tokenizer.
        batch_size: sequences a forward pass.

    Raises:
        RuntimeError: weights are missing, left over or of another shape.
    """
    dtype, device = platform.training_dtype("auto"), platform.device()
    model: Any
    if is_quantized(folder):
        model = whole(folder).to(device)
    else:
        several = platform.HAS_GPU and torch.cuda.device_count() > 1
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            **({"device_map": "auto"} if several else {}),
        )
        model, report = loaded
        wrong = [name for kind in report.values() for name in kind]
        if wrong:  # transformers would fill in random ones, and only log it
            raise RuntimeError(f"{folder}: weights are missing, left over or misshapen: {wrong}")
        model = model if several else model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ScoringLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


class MegatronLM(ScoringLM):
    """A Megatron-Core model, on any layout; all ranks ask the same.

    Everything but the model is lm-eval's `HFLM`, and so its figures are too: how texts are encoded,
    cut and put together.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int,
        batch_size: int,
        can_cache: bool,
    ) -> None:
        """Wrap it.

        Args:
            model: from `load_model`, not wrapped.
            tokenizer: its.
            max_length: tokens that it sees at most.
            batch_size: sequences a forward pass.
            can_cache: see `CausalLM`.
        """
        self.causal_lm = CausalLM(model, can_cache=can_cache)
        # HFLM asks a model where it is and what its configuration says.
        described = SimpleNamespace(device=platform.device(), config=SimpleNamespace())
        super().__init__(
            pretrained=described,
            backend="causal",
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
        )

    def _last_logits(self, tokens_bs: torch.Tensor, count: int) -> torch.Tensor:
        """Logits [b, count, vocabulary] behind the last of right-padded tokens [b, s]."""
        return self.causal_lm.logits(tokens_bs, count)

    def _can_share(self) -> bool:
        """Megatron-Core's cache has one length for all texts of a batch."""
        return False

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: torch.Tensor | None = None,
        **generation_kwargs: Any,  # noqa: ANN401 - a task's
    ) -> torch.Tensor:
        """Greedy continuations of left-padded tokens [b, s], behind these; HFLM cuts at `stop`.

        Raises:
            UserError: a task wants samples.
        """
        del stop
        sampled = generation_kwargs.get("do_sample") or generation_kwargs.get("temperature")
        beams = generation_kwargs.get("num_beams", 1)
        if sampled or beams != 1:
            raise UserError(
                f"tasks: a task generates with {generation_kwargs}, and a student in the format "
                "megatron is asked greedily only; leave the task out"
            )
        mask = torch.ones_like(context) if attention_mask is None else attention_mask
        rows = zip(context.tolist(), mask.tolist(), strict=True)
        prompts = [[t for t, seen in zip(*row, strict=True) if seen] for row in rows]
        new_tokens = max_length - context.size(1)
        end = self.eot_token_id
        found = continuations(self.causal_lm, prompts, new_tokens, {end}, self.max_length)
        longest = max(map(len, found))
        written = [tokens + [end] * (longest - len(tokens)) for tokens in found]
        new = torch.tensor(written, dtype=context.dtype, device=context.device)
        return torch.cat([context, new.view(len(found), longest)], dim=1)
