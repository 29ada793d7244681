"""Log-likelihoods are those of lm-eval's own `HFLM`, and no token is read that need not be."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from flagscale.evaluation.tasks.scoring import ScoringLM

WORDS, LONGEST = 50, 24
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": WORDS, "n_positions": LONGEST, "n_embd": 32, "n_layer": 2, "n_head": 4}


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(**GPT2, initializer_range=0.3))


def sliding() -> torch.nn.Module:
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5))


MODELS = {"llama": (llama, True), "gpt2": (gpt2, True), "a sliding window": (sliding, False)}


def lms(model: torch.nn.Module) -> tuple[HFLM, ScoringLM]:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    given = {"pretrained": model.eval(), "tokenizer": tokenizer, "batch_size": 3}
    # lm-eval's cache of logits is wrong about one text that is asked of twice, cut at two places.
    return HFLM(**given, logits_cache=False), ScoringLM(**given)


def questions() -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Of one answer and of several, of one token and more, some longer than what the model sees."""
    random.seed(0)
    asked = []
    for number in range(12):
        context = random.choices(range(3, WORDS), k=random.choice((1, 4, 9, 15, 30)))
        for answer in range(random.choice((1, 2, 5))):
            length = 1 if number % 3 == 0 else random.randint(1, 6)
            continuation = random.choices(range(3, WORDS), k=length)
            asked.append(((f"{number}", f"{answer}"), context, continuation))
    text = list(range(3, 15))
    cut = [(("cut", str(place)), text[:place], text[place:]) for place in (6, 11)]
    return [*asked, *cut, asked[0]]  # the same question twice


@pytest.mark.parametrize("name", MODELS)
def test_log_likelihoods_are_lm_evals(name: str) -> None:
    torch.manual_seed(0)
    make, _ = MODELS[name]
    theirs, ours = lms(make())
    asked = questions()
    with torch.no_grad():  # the most probable answers as well
        for key, context, _ in asked[::4]:
            logits_v = theirs.model(torch.tensor([context[-LONGEST:]])).logits[0, -1]
            asked.append((key, context, [int(logits_v.argmax())]))
    expected = theirs._loglikelihood_tokens(asked, disable_tqdm=True)

    found = ours._loglikelihood_tokens(asked, disable_tqdm=True)

    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], abs=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_context_is_read_once_where_that_is_the_same(name: str) -> None:
    make, shares = MODELS[name]
    _, ours = lms(make())
    read, predicted = [], []
    ours.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.append(output.shape[:2].numel())
    )
    ours.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: predicted.append(output.shape[:2].numel())
    )
    context = list(range(3, 13))
    asked = [(None, context, [answer, answer + 1]) for answer in (20, 30, 40)]

    ours._loglikelihood_tokens(asked, disable_tqdm=True)

    # The context's last token predicts an answer's first, and an answer's last predicts nothing.
    assert sum(read) == (9 + 3 * 2 if shares else 3 * (9 + 2))
    assert sum(predicted) == (1 + 3 * 2 if shares else 3 * 2)


def test_texts_are_scored_as_a_whole_too() -> None:
    theirs, ours = lms(llama())
    texts = [" ".join(f"w{i % 40 + 3}" for i in range(length)) for length in (3, 24, 70)]
    asked = [type("Request", (), {"args": (text,)}) for text in texts]

    found, expected = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in (ours, theirs))

    assert found == pytest.approx(expected, abs=1e-4)
