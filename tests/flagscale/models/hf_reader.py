"""What transformers makes of folders, in whatever version is there: 5 by import, 4 as a process.

    PYTHONPATH=.venv/transformers-4 python hf_reader.py REQUEST.json ANSWER.pt

It imports nothing of this project.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TRANSFORMERS_4 = Path(sys.prefix) / "transformers-4"


@torch.no_grad()
def read_model(folder: str, tokens: list[list[int]]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), (folder, report)
    prompt = torch.tensor(tokens[0])[None, :8]
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
    )
    return {
        "logits": model(torch.tensor(tokens), use_cache=False).logits,
        "dtype": str(model.dtype),
        "written": written.tolist(),
    }


def read_config(folder: str) -> dict[str, Any]:
    """Every attribute that the configuration's class has a parameter for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    names = set(inspect.signature(type(config).__init__).parameters) - {"self", "args", "kwargs"}
    names |= set(getattr(type(config), "__dataclass_fields__", {}))
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def read_tokenizer(folder: str, texts: list[str]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    found = {
        "ids": ids,
        "plain": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "decoded": [tokenizer.decode(one) for one in ids],
        "shown": [tokenizer.decode(one, skip_special_tokens=True) for one in ids],
        "inputs": sorted(tokenizer("a")),
        "special": {
            name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token", "pad_token")
        },
        "all_special": sorted(tokenizer.all_special_tokens),
        "padded": tokenizer(texts[:2], padding=True)["input_ids"] if tokenizer.pad_token else None,
        "length": tokenizer.model_max_length,
    }
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
        found["chat"] = tokenizer.apply_chat_template(messages, tokenize=False)
        templates = tokenizer.chat_template
        found["templates"] = sorted(templates) if isinstance(templates, dict) else None
    return found


def read(request: dict[str, Any]) -> dict[str, Any]:
    """Of `models`, `configs` and `tokenizers`, lists of folders: what is made of each."""
    return {
        "models": {name: read_model(name, request["tokens"]) for name in request["models"]},
        "configs": {name: read_config(name) for name in request["configs"]},
        "tokenizers": {
            name: read_tokenizer(name, request["texts"]) for name in request["tokenizers"]
        },
    }


def read_with_transformers_4(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """In a process that has transformers 4, and no variable of this one."""
    assert TRANSFORMERS_4.is_dir(), f"{TRANSFORMERS_4} is not there: make it with `make test`"
    asked, answer = folder / "request.json", folder / "answer.pt"
    asked.write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(asked), str(answer)],
        env={
            "PATH": os.defpath,
            "HOME": str(folder),
            "PYTHONPATH": str(TRANSFORMERS_4),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(answer, weights_only=False)
    assert found["version"].startswith("4.57."), found["version"]
    return found | {"stderr": done.stderr}


if __name__ == "__main__":
    import transformers

    made = read(json.loads(Path(sys.argv[1]).read_text()))
    torch.save(made | {"version": transformers.__version__}, sys.argv[2])
