"""A toleration, of a platform file or of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from flagscale.recipe import Section
from flagscale.recipe.section import NonNegativeInt
from flagscale.run_values.kubernetes_names import LabelKey, LabelValue


class Toleration(Section):
    """A taint of nodes that the pods may run on; names are those of Kubernetes."""

    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: NonNegativeInt | None = None  # noqa: N815 - Kubernetes' spelling

    @model_validator(mode="after")
    def _check(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(f"operator=Exists takes no value, but value={self.value!r}")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator=Equal needs a key")
        if self.tolerationSeconds is not None and self.effect != "NoExecute":
            raise ValueError(
                f"tolerationSeconds={self.tolerationSeconds} is only for effect=NoExecute"
            )
        return self
