"""Random tiny models of every family, and Megatron-Core's process state for them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from variants import random_model

from flagscale.checkpoint import save_weights
from flagscale.checkpoint.stored import StoredTensors
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape, from_hf_config, hf_config_for
from flagscale.models.hf_export import write_weights
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


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """What transformers reads of a model that is stored, and written as export-student does."""

    def read(model: GPTModel, shape: ModelShape, template: PreTrainedConfig) -> PreTrainedModel:
        save_weights(model, tmp_path / "student")
        folder = tmp_path / "exported"
        hf_config_for(shape, template).save_pretrained(folder)
        write_weights(StoredTensors(tmp_path / "student"), WeightMap(shape), folder, torch.float32)
        found, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        return found

    return read
