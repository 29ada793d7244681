"""What every section of the recipe is built from."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flagscale.secrets import has_credentials, hide_in_urls

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]


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


SectionT = TypeVar("SectionT", bound=Section)
