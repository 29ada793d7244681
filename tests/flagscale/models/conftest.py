"""Random tiny models of every family, and Megatron-Core's process state for them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from megatron.core.models.gpt import GPTModel
from transformers import AutoConfig, PreTrainedModel
from variants import random_model

from flagscale.megatron import platform
from flagscale.megatron.shape import from_hf_config
from flagscale.models.hf_folder import HFFolder
from flagscale.models.hf_import import check_tensors, fill
from flagscale.models.hf_weights import WeightMap
from flagscale.models.megatron import build_model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return random_model


@pytest.fixture
def runtime() -> Iterator[None]:
    with platform.runtime():
        yield


@pytest.fixture
def imported() -> Callable[[Path], GPTModel]:
    """Reads the model of a Hugging Face folder, as prepare-teacher does; within the runtime."""

    def read(folder: Path) -> GPTModel:
        shape = from_hf_config(AutoConfig.from_pretrained(folder))
        source = HFFolder(folder)
        check_tensors(source, shape)
        model = build_model(shape, 128, params_dtype=source.dtype())
        fill(model, source, WeightMap(shape))
        return model

    return read
