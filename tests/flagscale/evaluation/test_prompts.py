from pathlib import Path

import pytest

from flagscale.errors import UserError
from flagscale.evaluation.generation.prompts import encode_prompts
from flagscale.models.tokenizers import load_tokenizer


def test_prompts_begin_as_documents_do(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.add_special_tokens({"bos_token": "<s>"})  # 1000
    ids = tokenizer("A list", add_special_tokens=False)["input_ids"]
    assert encode_prompts(["A list"], tokenizer, None, 1000) == [ids]
    both = encode_prompts(["A list", "<s>A list"], tokenizer, 1000, 1001)
    assert both == [[1000, *ids]] * 2  # a template has written the second


def test_prompts_that_no_model_can_read(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(UserError, match=r"'an <extra>' has the token '<extra>' \(1000\), .* 1000"):
        encode_prompts(["an <extra>"], tokenizer, None, 1000)
    with pytest.raises(UserError, match="'' has no tokens"):
        encode_prompts([""], tokenizer, 0, 1000)
