"""What a report is made of, as numbers: written beside the page, so that it can be made again.

`evaluate` writes it; whoever knows more later (the scores on tasks, the same student trained with
other seeds) renders the page anew with both. Without torch: whoever renders runs no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.artifacts import Manifest, write_json
from flagscale.errors import UserError
from flagscale.evaluation import REPORT_DATA
from flagscale.evaluation.fidelity import Fidelity, read_rows
from flagscale.evaluation.generation.speed import Speed
from flagscale.evaluation.report.costs import Costs
from flagscale.evaluation.report.token_findings import TokenFindings


@dataclass(frozen=True)
class Other:
    """Another run's student, measured on the same documents beside the same teacher.

    Attributes:
        name: for people.
        kind: `baseline` (no teacher), `seed` (nothing but training.seed differs) or `run`.
        sums: figure -> sum per document, of its distilled student.
    """

    name: str
    kind: str
    sums: Mapping[str, np.ndarray]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `of_json`."""
        sums = {figure: sums_d.tolist() for figure, sums_d in self.sums.items()}
        return {"name": self.name, "kind": self.kind, "sums": sums}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Other:
        """The inverse of `as_json`."""
        sums = {figure: np.array(sums_d) for figure, sums_d in values["sums"].items()}
        return cls(values["name"], values["kind"], sums)


@dataclass(frozen=True)
class ReportData:
    """What a report is made of.

    Attributes:
        metrics: as in metrics.json.
        fidelity: sums per document.
        training: rows of training.jsonl.
        validation: rows of validation.jsonl.
        generations: one mapping a prompt: `prompt`, and each model's continuation.
        layers: of each model.
        parameters: of each model.
        manifests: of the inputs, by name, in the order in which they were made.
        evaluation: the recipe's section.
        findings: where in the text the models disagree; None where no token was looked at.
        costs: what the student took to make; None where it is not known.
        others: runs that it is read beside.
        generation: model -> how fast it writes, of each engine (`generation_speed.Speed`); told by
            who asks the models tasks, and not saved here.
    """

    metrics: Mapping[str, Any]
    fidelity: Fidelity
    training: Sequence[Mapping[str, float]]
    validation: Sequence[Mapping[str, float]]
    generations: Sequence[Mapping[str, str]]
    layers: Mapping[str, int]
    parameters: Mapping[str, int]
    manifests: Mapping[str, Manifest]
    evaluation: Mapping[str, Any]
    findings: TokenFindings | None = None
    costs: Costs | None = None
    others: Sequence[Other] = ()
    generation: Mapping[str, Sequence[Speed]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """`distillation`, or `training` where the student saw the text alone."""
        loss = self.manifests["distilled"].recipe.get("distillation", {}).get("loss")
        return "training" if loss == "none" else "distillation"

    def save(self, folder: Path) -> None:
        """Write report.json."""
        values = {name: getattr(self, name) for name in _PLAIN}
        values["fidelity"] = list(self.fidelity.rows())
        values["manifests"] = {name: asdict(one) for name, one in self.manifests.items()}
        values["findings"] = self.findings.as_json() if self.findings else None
        values["costs"] = asdict(self.costs) if self.costs else None
        values["others"] = [one.as_json() for one in self.others]
        write_json(folder / REPORT_DATA, values)

    @classmethod
    def load(cls, folder: Path) -> ReportData:
        """Read what `save` wrote.

        Args:
            folder: of an `evaluation` artifact.

        Raises:
            UserError: there is no report.json, or it is damaged.
        """
        path = folder / REPORT_DATA
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                fidelity=read_rows(values["fidelity"]),
                manifests={name: Manifest(**one) for name, one in values["manifests"].items()},
                findings=TokenFindings.of_json(values["findings"]) if values["findings"] else None,
                costs=Costs(**values["costs"]) if values["costs"] else None,
                others=[Other.of_json(one) for one in values["others"]],
                **{name: values[name] for name in _PLAIN},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not what a report is made of ({error!r}); evaluate the student anew"
            ) from error


_PLAIN = (
    "metrics",
    "training",
    "validation",
    "generations",
    "layers",
    "parameters",
    "evaluation",
)
