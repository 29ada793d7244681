"""A model's configuration and weights. Those of a GGUF file are dequantised while they are read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.imports import late, uncollected
from flagscale.megatron.config_fields import check_spellings
from flagscale.models.location import UNREADABLE, Location, locate, not_fetched, read
from flagscale.patience import patiently

if TYPE_CHECKING:
    from flagscale.models.gguf_file import GGUFFile

_LATE = {
    "accelerate": ("dispatch_model",),
    "accelerate.utils": ("get_max_memory",),
    "accelerate.utils.modeling": ("clean_device_map", "get_max_layer_size"),
    "transformers.integrations.flash_attention": ("flash_attention_forward",),
}


def load_hf_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's configuration.

    Args:
        source: see `locate`.
        revision: see there.

    Raises:
        UserError: there is none, it cannot be read, it says a thing twice and differently, or it is
            an adapter's.
    """
    place = locate(source, revision)
    # transformers imports most of itself only now: for the names of activations also how attention
    # is served in batches, which decorates itself with torch's compiler, and loads it; and how
    # weights are spread over devices, by accelerate.
    with uncollected(), late(_LATE):
        if "gguf_file" in place.options:
            return _gguf(source, place).config
        if place.is_local:
            _check_no_adapter(source, Path(place.name))
        config: PreTrainedConfig = read(AutoConfig, source, "configuration", place)
    if place.is_local:
        raw = json.loads((Path(place.name) / CONFIG_NAME).read_text(encoding="utf-8"))
        check_spellings(raw, f"configuration of {source}")
    return config


@contextmanager
def weights_folder(source: str, revision: str | None = None) -> Iterator[Path]:
    """The folder with a model's configuration and safetensors.

    Of a Hugging Face id it is in the hub's cache. The weights of a GGUF file are dequantised and
    written to a folder that is gone afterwards: in this machine's temporary folder, not on a volume
    that others share.

    Args:
        source: see `locate`.
        revision: see there.

    Raises:
        UserError: it cannot be found, fetched or read.
    """
    place = locate(source, revision)
    if "gguf_file" in place.options:
        with tempfile.TemporaryDirectory(prefix="flagscale-gguf-") as name:
            _gguf(source, place).write(Path(name))
            yield Path(name)
        return
    folder = Path(place.name) if place.is_local else _download(source, revision)
    _check_no_adapter(source, folder)
    from flagscale.models.hf_folder import HFFolder  # which takes torch, others here do not

    HFFolder(folder, source).check_single_file()
    yield folder


def _download(source: str, revision: str | None) -> Path:
    """The snapshot of a Hugging Face id, with its configuration and weights alone."""

    def fetch(name: str) -> Path:
        def download() -> str:
            return hf_hub_download(source, name, revision=revision)

        return Path(patiently(download, f"fetch {name} of {source}", is_hub_away))

    name = CONFIG_NAME
    try:
        folder = fetch(name).parent
        # What is not the model, but says that the rest is not, or not alone.
        for besides in (ADAPTER_CONFIG_NAME, GENERATION_CONFIG_NAME):
            with suppress(EntryNotFoundError):
                fetch(besides)
        _check_no_adapter(source, folder)
        load_hf_config(folder)
        try:
            index = json.loads(fetch(SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
            with suppress(EntryNotFoundError):
                fetch(SAFE_WEIGHTS_NAME)  # which transformers would read
        except EntryNotFoundError:
            files = [SAFE_WEIGHTS_NAME]
        for name in files:
            fetch(name)
    except EntryNotFoundError as error:
        raise UserError(
            f"model {source}: {name} is not on the hub; give a model that transformers' "
            "save_pretrained wrote (pickled weights, .bin, are not read)"
        ) from error
    except UNREADABLE as error:
        raise not_fetched("model", source, error) from error
    return folder


def _check_no_adapter(source: str | Path, folder: Path) -> None:
    """Refuse an adapter, also one that lies beside a model: transformers would load both."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(
            f"model {source}: {ADAPTER_CONFIG_NAME} says that it is an adapter of a model: merge "
            "it first, with peft's merge_and_unload, or remove it"
        )


def _gguf(source: str | Path, place: Location) -> GGUFFile:
    from flagscale.models.gguf_file import GGUFFile  # which takes torch, others here do not

    return GGUFFile(Path(place.name) / place.options["gguf_file"], str(source))
