"""What the sizes of all steps follow from: recipe, teacher, student, and the machines."""

from __future__ import annotations

from dataclasses import dataclass

from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ParallelismRecipe, Recipe
from flagscale.recipe.teacher_outputs import reads_outputs
from flagscale.sizes.activations import FLOAT32, Computation
from flagscale.sizes.layout import Layout
from flagscale.sizes.machine import Machine
from flagscale.sizes.models import ModelSteps
from flagscale.sizes.parameters import parameters
from flagscale.sizes.quantization import exported_bytes, quantizers_bytes
from flagscale.sizes.teacher import Teacher
from flagscale.sizes.training import Training

_EXPORTED = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Job:
    """A recipe whose models' sizes are known, on machines that are known.

    Attributes:
        recipe: without a sweep, or one variant of it.
        teacher: from its source.
        student: its shape.
        models: a pod of the model steps.
        training: a pod of the training.
        student_source: where the student is a model of its own: what is known of it.
        layers_measured: whether another step measures layers for its student, and for others.
    """

    recipe: Recipe
    teacher: Teacher
    student: ModelShape
    models: Machine
    training: Machine
    student_source: Teacher | None = None
    layers_measured: bool = False

    @property
    def distilled_from(self) -> ModelShape | None:
        """The teacher's shape, where the training has one."""
        return None if self.recipe.distillation.loss == "none" else self.teacher.shape

    @property
    def reads_outputs(self) -> bool:
        """Whether the training reads what was kept of the teacher, and does not run it."""
        return reads_outputs(self.recipe.distillation)

    @property
    def runs_in_training(self) -> ModelShape | None:
        """The teacher's shape, where the training runs it."""
        return None if self.reads_outputs else self.distilled_from

    @property
    def training_layout(self) -> Layout:
        """Of all pods together."""
        sizes, machine = self.recipe.training.parallelism, self.training
        a_pod = sizes.processes or machine.accelerators
        return Layout.of(sizes, a_pod * machine.pods if a_pod else None)

    @property
    def training_setup(self) -> Training:
        """What decides on the training's memory."""
        training, machine = self.recipe.training, self.training
        on_gpu = machine.device == "cuda"
        precision = training.precision
        if precision == "auto":
            precision = "bf16" if on_gpu else "fp32"
        sharded = training.parallelism.use_distributed_optimizer
        ranks = training.micro_batch_size * self.training_layout.data
        quantized = self.recipe.student.quantization is not None
        return Training(
            seq_length=self.recipe.data.seq_length,
            micro_batch_size=training.micro_batch_size,
            micro_batches=max(1, training.global_batch_size // ranks),
            computation=Computation(
                2 if precision == "bf16" else FLOAT32,
                on_gpu and training.transformer_impl != "local" and not quantized,
                training.recompute_granularity,
            ),
            distributed_optimizer=on_gpu if sharded is None else sharded,
            distillation=self.recipe.distillation,
            device=machine.device,
            quantized=quantized,
            outputs=self.recipe.teacher_outputs.codec if self.reads_outputs else None,
        )

    @property
    def model_steps(self) -> ModelSteps:
        """What decides on the model steps' memory."""
        student = self.recipe.student
        measures = student.measures_layers and not self.layers_measured
        return ModelSteps(
            teacher=self.teacher.shape,
            student=self.student,
            source_bytes=self.teacher.dtype_bytes,
            student_source_bytes=self.student_source.dtype_bytes if self.student_source else None,
            export_bytes=_EXPORTED[self.recipe.export.dtype],
            seq_length=self.recipe.data.seq_length,
            evaluated=self.recipe.evaluation.micro_batch_size,
            device=self.models.device,
            measured_tokens=student.measured_tokens if measures else 0,
            fitted_tokens=student.reconstruction.tokens if student.reconstruction else 0,
        )

    @property
    def teacher_bytes(self) -> int:
        """Of the teacher's weights in its artifact."""
        return self.teacher.dtype_bytes * parameters(self.teacher.shape).total

    @property
    def student_bytes(self) -> int:
        """Of the untrained student's weights in its artifact."""
        size = (self.student_source or self.teacher).dtype_bytes
        return size * parameters(self.student).total + self._quantizers_bytes

    @property
    def _quantizers_bytes(self) -> int:
        quantization = self.recipe.student.quantization
        if quantization is None:
            return 0
        return quantizers_bytes(self.student, quantization.recipe)

    @property
    def distilled_bytes(self) -> int:
        """Of the trained student's."""
        size = self.training_setup.computation.dtype_bytes
        return size * parameters(self.student).total + self._quantizers_bytes

    @property
    def exported_bytes(self) -> int:
        """Of the model that comes out."""
        count, size = parameters(self.student).total, _EXPORTED[self.recipe.export.dtype]
        quantization = self.recipe.student.quantization
        if quantization is not None and self.recipe.export.format == "huggingface":
            return exported_bytes(self.student, quantization.recipe, count, size)
        return size * count

    def model_sizes(self, chosen: ParallelismRecipe | None) -> ParallelismRecipe:
        """The recipe's layout of the model steps, or else the chosen one, or a lone process."""
        if self.recipe.models.parallelism is not None:
            return self.recipe.models.sizes
        return chosen or ParallelismRecipe()
