"""Load a Hugging Face folder and use it, with transformers alone: run by `hf_export`.

    python -I reload_hf.py FOLDER REQUEST.json ANSWER.safetensors

It imports nothing of this project, so that it proves what it proves. It writes the logits of the
request's tokens and prints, as JSON, a greedy continuation of the request's prompt.
"""

import json
import sys
from typing import Any

_NEW_TOKENS = 16


def main(folder: str, request: str, answer: str) -> None:
    """Answer a request.

    Args:
        folder: what `save_pretrained` would have written.
        request: JSON file with `tokens` (lists of ids) and `prompt` (ids).
        answer: file for the logits, float32 [b, s, vocabulary].
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(request, encoding="utf-8") as stream:
        values = json.load(stream)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    wrong = [name for kind in report.values() for name in kind]
    if wrong:
        raise ValueError(f"weights are missing, left over or of another shape: {wrong[:3]}")
    with torch.no_grad():
        logits_bsv = model.eval()(torch.tensor(values["tokens"]), use_cache=False).logits
        prompt = torch.tensor([values["prompt"]])
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
        )
    save_file({"logits": logits_bsv.contiguous()}, answer)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    json.dump(tokenizer.decode(written[0, prompt.size(1) :]), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
