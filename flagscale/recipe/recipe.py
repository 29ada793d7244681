"""The whole recipe: its sections together, and what they take from one another."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from flagscale.recipe.architecture import ArchitectureRecipe
from flagscale.recipe.combinations import check_combination, check_on_cpu, check_width_pruning
from flagscale.recipe.data import DataRecipe
from flagscale.recipe.distillation import DistillationRecipe
from flagscale.recipe.model_steps import ModelsRecipe
from flagscale.recipe.models import TeacherRecipe
from flagscale.recipe.promote import PromoteRecipe, check_promotion
from flagscale.recipe.quantized_training import check_quantization, check_quantized_on_cpu
from flagscale.recipe.results import EvaluationRecipe, ExportRecipe, ResourcesRecipe, TrackingRecipe
from flagscale.recipe.search import SearchRecipe
from flagscale.recipe.search_checks import check_search
from flagscale.recipe.section import Section
from flagscale.recipe.student import StudentRecipe
from flagscale.recipe.sweep import SweepRecipe, with_first_values
from flagscale.recipe.tasks import TasksRecipe
from flagscale.recipe.teacher_outputs import (
    TeacherOutputsRecipe,
    met_by,
    reads_outputs,
    unserved,
)
from flagscale.recipe.training import TrainingRecipe
from flagscale.recipe.variants import Variant, candidates, variants

# Kubernetes' and MLflow's objects are called after it.
_NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$"


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=_NAME, max_length=63, examples=["tiny"])
    teacher: TeacherRecipe
    student: StudentRecipe
    data: DataRecipe = DataRecipe()
    distillation: DistillationRecipe = DistillationRecipe()
    teacher_outputs: TeacherOutputsRecipe = TeacherOutputsRecipe()
    training: TrainingRecipe
    evaluation: EvaluationRecipe = EvaluationRecipe()
    export: ExportRecipe = ExportRecipe()
    tasks: TasksRecipe = TasksRecipe()
    models: ModelsRecipe = ModelsRecipe()
    tracking: TrackingRecipe = TrackingRecipe()
    resources: ResourcesRecipe = ResourcesRecipe()
    promote: PromoteRecipe | None = Field(
        None,
        description="What a student must have shown to become the champion; default: none does",
    )
    sweep: SweepRecipe | None = Field(None, description="Many trainings in one run; default: one")
    search: SearchRecipe | None = Field(
        None, description="Many students in one run, of which the best is trained to the end"
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:  # noqa: ANN401 - whatever YAML held
        """Fill in what one section takes from another, so that each section stands alone."""
        if not isinstance(values, dict):
            return values
        values = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
        values = with_first_values(values)
        teacher = values.get("teacher")
        data = values.setdefault("data", {})
        export = values.setdefault("export", {})
        if isinstance(teacher, dict) and isinstance(data, dict) and data.get("tokenizer") is None:
            data["tokenizer"] = teacher.get("source")
            data["tokenizer_revision"] = teacher.get("revision")
        if isinstance(export, dict) and export.get("registered_model_name") is None:
            export["registered_model_name"] = values.get("name")
        return values

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        """Refuse what its sections ask for together and would not get."""
        # Without one it is the teacher's, which is known when that has been fetched.
        check_combination(self.distillation, self.training, self.student.architecture)
        if self.student.quantization is not None:
            check_quantization(self.student.quantization, self.training, self.export.format)
        if reads_outputs(self.distillation):
            reason = unserved(self.distillation, self.teacher_outputs)
            if reason is not None:
                raise ValueError(reason)
        if self.promote is not None:
            check_promotion(self.promote, self.evaluation, self.tasks)
        check_width_pruning(self.student, self.models.sizes)
        architecture = self.student.architecture or ArchitectureRecipe()
        if not architecture.is_default and self.export.format != "megatron":
            changed = architecture.model_dump(mode="json", exclude_defaults=True)
            raise ValueError(
                f"export.format={self.export.format} with student.architecture={changed}: no "
                "configuration of Hugging Face is known to hold that; set export.format=megatron"
            )
        if architecture.moe_aux_loss_coeff and any(c.format == "chat" for c in self.data.corpora):
            raise ValueError(
                f"student.architecture.moe_aux_loss_coeff={architecture.moe_aux_loss_coeff} with "
                "data.format=chat: Megatron-Core weighs the balance loss by all tokens and divides "
                "by those with a loss, so it would be as much too heavy as tokens are masked; set "
                "moe_aux_loss_coeff=0"
            )
        return self

    @model_validator(mode="after")
    def _check_sweep(self) -> Recipe:
        if self.sweep is not None and self.search is not None:
            raise ValueError(
                "sweep and search are both given: a sweep trains all its variants to the end, a "
                "search drops most of its candidates; leave one of the two out"
            )
        if self.search is not None:
            seq_length, batch = self.data.seq_length, self.training.global_batch_size
            # A recipe is frozen by now; what is written down, and all that follows, has steps.
            object.__setattr__(self, "search", self.search.in_steps(batch * seq_length))
            check_search(
                self.search,
                self.search.count,
                self.distillation,
                self.training,
                seq_length,
                self.tasks,
            )
        met_by(self.trainings, self.teacher_outputs)
        return self

    @property
    def variants(self) -> list[Variant[Recipe]]:
        """The sweep's variants or the search's candidates, each a whole recipe; else none."""
        if self.search is not None:
            return candidates(self, self.search)
        return [] if self.sweep is None else variants(self, self.sweep)

    @property
    def varied(self) -> str:
        """What errors call one of `variants`."""
        return "search.candidates:" if self.search else "sweep.vary: the variant"

    @property
    def trainings(self) -> list[Recipe]:
        """The recipes of all trainings: of a sweep's variants, a search's candidates, or this."""
        return [variant.recipe for variant in self.variants] or [self]

    @property
    def caches_teacher(self) -> bool:
        """Whether a training reads teacher outputs, so that a step must make them."""
        return any(reads_outputs(training.distillation) for training in self.trainings)

    @property
    def measures_layers_once(self) -> bool:
        """Whether several students measure layers, so that a step is to do so for all of them."""
        return sum(training.student.measures_layers for training in self.trainings) > 1

    @model_validator(mode="after")
    def _check_ranks(self) -> Recipe:
        self.check_accelerators(0)
        return self

    def check_models(self, accelerator_count: int) -> None:
        """Refuse a layout of the model steps that their pods could not hold.

        Args:
            accelerator_count: of one of their pods; 0 on CPUs.

        Raises:
            ValueError: too few for the processes.
        """
        if accelerator_count == 0 and self.student.quantization is not None:
            check_quantized_on_cpu(self.student.quantization)
        if 0 < accelerator_count < self.models.processes:
            raise ValueError(
                f"models.parallelism asks for {self.models.processes} processes, but a pod of "
                f"the model steps has {accelerator_count} accelerator(s): a process needs one of "
                "its own"
            )

    def check_on_cpu(self) -> None:
        """Refuse a training that its pods, which have no accelerators, could not do.

        Raises:
            ValueError: what only a GPU can do.
        """
        check_on_cpu(self.training, self.student.architecture)
        if self.student.quantization is not None:
            check_quantized_on_cpu(self.student.quantization)

    def check_accelerators(self, accelerator_count: int) -> None:
        """Refuse a training that its pods could not be divided for.

        Args:
            accelerator_count: of one training pod; 0 on CPUs, or where no platform is known yet.

        Raises:
            ValueError: too few for the processes, or a number that the layout does not divide.
        """
        nodes, per_node = self.resources.nodes, self.training.parallelism.processes
        if accelerator_count and (per_node or 0) > accelerator_count:
            raise ValueError(
                f"training.parallelism.processes={per_node} with accelerator_count="
                f"{accelerator_count} a pod: a process needs an accelerator of its own"
            )
        processes = per_node or accelerator_count
        if processes:
            try:
                self.training.check_world_size(nodes * processes)
            except ValueError as error:
                raise ValueError(
                    f"training.{error} (resources.nodes={nodes}, {processes} each)"
                ) from error
