"""A model's configuration and weights. Those of a GGUF file are dequantised while they are read."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.imports import uncollected
from flagscale.models.location import UNREADABLE, locate, not_fetched, read
from flagscale.patience import patiently

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_hf_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's configuration.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    place = locate(source, revision)
    with uncollected():  # transformers imports most of itself only now
        config: PreTrainedConfig = read(AutoConfig, source, "configuration", place)
    return config


def load_hf_model(
    source: str | Path, revision: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode and unquantised.

    Args:
        source: see `locate`.
        revision: see there.
        dtype: of its weights; default: float32.

    Raises:
        UserError: it is missing, corrupt, or lacks weights that its configuration asks for.
    """
    import torch  # `prepare-data` only wants the tokenizer
    from transformers import AutoModelForCausalLM

    place = locate(source, revision)
    dtype = dtype or torch.float32
    model, report = read(
        AutoModelForCausalLM, source, "model", place, dtype=dtype, output_loading_info=True
    )
    lacking = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if lacking:
        # transformers would only warn, and go on with random weights
        raise UserError(f"model {source}: {len(lacking)} weights are missing, first {lacking[0]}")
    if getattr(model, "is_quantized", False):
        model = _unquantised(model)
    return model.eval()


@contextmanager
def weights_folder(source: str, revision: str | None = None) -> Iterator[Path]:
    """The folder with a model's configuration and safetensors.

    Of a Hugging Face id it is in the hub's cache. The weights of a GGUF file are dequantised by
    transformers, and written to a folder that is gone afterwards: in this machine's temporary
    folder, not on a volume that others share.

    Args:
        source: see `locate`.
        revision: see there.

    Raises:
        UserError: it cannot be found, fetched or read.
    """
    place = locate(source, revision)
    if "gguf_file" in place.options:
        with tempfile.TemporaryDirectory(prefix="flagscale-gguf-") as name:
            load_hf_model(source).save_pretrained(name)
            yield Path(name)
    elif place.is_local:
        yield Path(place.name)
    else:
        yield _download(source, revision)


def _download(source: str, revision: str | None) -> Path:
    """The snapshot of a Hugging Face id, with its configuration and weights alone."""

    def fetch(name: str) -> Path:
        def download() -> str:
            return hf_hub_download(source, name, revision=revision)

        return Path(patiently(download, f"fetch {name} of {source}", is_hub_away))

    name = CONFIG_NAME
    try:
        folder = fetch(name).parent
        with suppress(EntryNotFoundError):
            fetch(GENERATION_CONFIG_NAME)
        try:
            index = json.loads(fetch(SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except EntryNotFoundError:
            files = [SAFE_WEIGHTS_NAME]
        for name in files:
            fetch(name)
    except EntryNotFoundError as error:
        raise UserError(
            f"model {source}: {name} is not on the hub; give a model that transformers' "
            "save_pretrained wrote"
        ) from error
    except UNREADABLE as error:
        raise not_fetched("model", source, error) from error
    return folder


def _unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that transformers does not take for a quantised one."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model.config
    del config.quantization_config
    logger.info("dequantised %s to %s", config.model_type, model.dtype)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    buffers = dict(model.named_buffers())
    for name, _ in list(plain.named_buffers()):  # RoPE's frequencies are not in the state
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner).register_buffer(leaf, buffers[name], persistent=False)
    plain.tie_weights()
    return plain
