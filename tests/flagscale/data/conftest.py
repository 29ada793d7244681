"""A tokenizer small enough to be trained in a moment; a hub with a dataset."""

import time
from pydoc_data.topics import topics
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.flagscale.web_server import WebServer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 500 tokens; id 0 is `<|endoftext|>`, id 1 `<|im_start|>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([topics["for"], topics["with"]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|im_start|>"
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}MARK{{ message.content }}<|im_end|>ENDMARK"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with `<|im_end|>`, and a template that does not mark what the assistant says."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    chat = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.chat_template = CHAT_TEMPLATE.replace("ENDMARK", "").replace("MARK", "")
    return chat


@pytest.fixture(scope="session")
def marking_tokenizer(chat_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a template that marks it."""
    marking = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(chat_tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
    )
    marking.chat_template = CHAT_TEMPLATE.replace("ENDMARK", "{% endgeneration %}").replace(
        "MARK", "{% generation %}"
    )
    return marking


@pytest.fixture
def hub(web_server: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """A hub on which every dataset is the server's folder."""
    url, cache = web_server.url, str(web_server.folder.parent / "cache")
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    datasets_url = url + "/datasets/{repo_id}/resolve/{revision}/{path}"
    for name, value in {"HF_ENDPOINT": url, "HUB_DATASETS_URL": datasets_url}.items():
        monkeypatch.setattr(datasets.config, name, value)
    # The hub's client asks six times itself, which would take a test half a minute.
    at_once = SimpleNamespace(sleep=lambda _seconds: None, time=time.time)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", at_once)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    return web_server
