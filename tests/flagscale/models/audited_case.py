"""A distillation that defects are planted in, and how a plant gets at what it spoils."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.artifacts import open_artifact
from flagscale.megatron.global_vars import get_args
from flagscale.models import distillation_proof
from flagscale.models.audit_artifacts import audited_batch
from flagscale.models.distillation_audit import AUDITED_LOSS
from flagscale.models.student_audit import Artifacts, audit_student, load_pair
from flagscale.post_training import conversion
from flagscale.post_training.findings import Finding

TERMS = {
    "intermediate_layer_pairs": (("decoder.layers.0", "decoder.layers.1", "mse"),),
    "attention_layer_pairs": ((0, 1),),
}
Plant = Callable[["Case"], object]


class Case:
    """Two models, a batch and where they come from, for a plant to spoil."""

    def __init__(
        self, teacher: Path, student: Path, dataset: Path, folder: Path, patch: Any
    ) -> None:
        self.folder, self.patch = folder, patch
        kinds = {"teacher": teacher, "dataset": dataset}
        manifests = {kind: open_artifact(path, kind, False) for kind, path in kinds.items()}
        self.artifacts = Artifacts(student, teacher, dataset, manifests, [0, 3], torch.float32)
        self.student, self.teacher = load_pair(self.artifacts, get_args())
        self.loss = AUDITED_LOSS
        self.batch, self.unigram = audited_batch(dataset, self.teacher.unpadded_vocab_size)

    def audit(self) -> list[Finding]:
        """As convert-student does."""
        audited = audit_student(
            self.artifacts, self.student, self.teacher, self.batch, self.unigram, self.loss
        )
        return audited.findings


def after_conversion(change: Callable[[Any, GPTModel], object]) -> Plant:
    """Change a distillation model and its teacher, right after they have become one."""

    def plant(case: Case) -> None:
        def convert(student: GPTModel, teacher: GPTModel, *rest: Any) -> Any:
            model = conversion.convert_for_distillation(student, teacher, *rest)
            change(model, teacher)
            return model

        case.patch.setattr(distillation_proof, "convert_for_distillation", convert)

    return plant


def apart(case: Case) -> None:
    """Output layers and losses are not fused: there are logits."""
    case.loss = AUDITED_LOSS.model_copy(update={"fuse_output_layer": False})


def with_logits(plant: Plant) -> Plant:
    """Fused, the losses of masked tokens are not even made."""

    def planted(case: Case) -> None:
        apart(case)
        plant(case)

    return planted


def with_terms(plant: Plant) -> Plant:
    """Layers and attentions are matched too."""

    def planted(case: Case) -> None:
        case.loss = AUDITED_LOSS.model_copy(update=TERMS)
        plant(case)

    return planted
