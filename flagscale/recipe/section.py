"""What every section of the recipe is built from: the types of its fields, and their common rules.

A type is as narrow as what its values are used for: what no run could do is refused when it is
read, not after hours. `tests/flagscale/recipe/test_bounds.py` finds a field whose type has no
bounds.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flagscale.secrets import has_credentials, hide_in_urls

# The largest whole number that Megatron's indices, torch's and numpy's seeds, Kubernetes' counts
# and KFP, which carries numbers as floating-point ones, all take; with room for ranks and epochs.
MOST = 2**31 - 1
_LARGEST = 1e30  # float32 ends at 3e38
_LONGEST_PATH = 4095  # bytes, as Linux has it
_LONGEST_FILE_NAME = 255  # bytes
_LONGEST_TEXT = 100_000  # characters: what a step can be given (`pipelines.form`)


def _number(value: object) -> object:
    """YAML reads yes, no, on and off as true and false, and Python takes those for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def one_line(text: str) -> str:
    """The text, if it says something and has no signs that end or change a line.

    Raises:
        ValueError: what it must be.
    """
    if not text.strip():
        raise ValueError("must not be blank; leave it out for the default")
    wrong = next((sign for sign in text if unicodedata.category(sign) in ("Cc", "Zl", "Zp")), None)
    if wrong is not None:
        raise ValueError(f"must be one line of text, and holds {wrong!r}")
    return text


def _path(text: str) -> str:
    """A file of such a name there cannot be, and looking for it is an error in itself."""
    if len(text.encode()) > _LONGEST_PATH:
        raise ValueError(f"must be no longer than {_LONGEST_PATH} bytes")
    if any(len(part.encode()) > _LONGEST_FILE_NAME for part in text.split("/")):
        raise ValueError(f"no part between / may be longer than {_LONGEST_FILE_NAME} bytes")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank; leave it out")
    return text


NUMBER = BeforeValidator(_number)
PositiveInt = Annotated[int, Field(ge=1, le=MOST), NUMBER]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST), NUMBER]
Ranks = Annotated[int, Field(ge=1, le=2**16), NUMBER]  # sizes of process groups, pods
Width = Annotated[int, Field(ge=1, le=2**24), NUMBER]  # sizes of a model
Seed = NonNegativeInt
Tolerance = Annotated[float, Field(ge=1e-6, le=_LARGEST), NUMBER]  # float32 rounds to 1e-7
Fraction = Annotated[float, Field(ge=0, lt=1), NUMBER]
Positive = Annotated[float, Field(gt=0, le=_LARGEST), NUMBER]
NonNegative = Annotated[float, Field(ge=0, le=_LARGEST), NUMBER]
Scale = Annotated[float, Field(ge=1e-6, le=1e6), NUMBER]  # of a loss, or of one among others
# What `auto` comes to is decided on the machine, of those of speed by
# `flagscale.megatron.performance`.
Switch = Literal["auto"] | bool
Text = Annotated[str, Field(max_length=_LONGEST_TEXT)]
Prose = Annotated[str, Field(max_length=_LONGEST_TEXT), AfterValidator(_not_blank)]
Line = Annotated[str, Field(max_length=1000), AfterValidator(one_line)]
Source = Annotated[
    str, Field(max_length=_LONGEST_PATH), AfterValidator(one_line), AfterValidator(_path)
]
Token = Annotated[str, Field(min_length=1, max_length=1000)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _no_secrets(self) -> Section:
        """A recipe is stored with every artifact, in MLflow and in KFP's database."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, str) and has_credentials(value):
                raise ValueError(
                    f"{name}={hide_in_urls(value)}: holds credentials, and a recipe is stored and "
                    "shown with every run; give them as environment variables (AWS_ACCESS_KEY_ID, "
                    "HF_TOKEN, ...), on a cluster by a secret of the platform file"
                )
        return self

    @model_validator(mode="after")
    def _no_zeros(self) -> Section:
        """Names of files end at a zero, and PostgreSQL takes none."""
        for name in type(self).model_fields:
            for text in _texts(getattr(self, name)):
                if "\0" in text:
                    raise ValueError(
                        f"{name}={text!r}: holds the character 0, which no database takes"
                    )
        return self


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401 - of any field
    """The texts in a value; those of a section in it have been looked at."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


SectionT = TypeVar("SectionT", bound=Section)
