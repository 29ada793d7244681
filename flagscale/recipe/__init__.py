"""The recipe: one YAML file that says everything about a run, strictly validated.

Names are Megatron's where Megatron has one. Read a file with `load_recipe`; each section is also
usable alone, because a pipeline step is given only the sections that it depends on (so that
changing the temperature does not repeat the data preparation).
"""

from flagscale.recipe.architecture import ArchitectureRecipe
from flagscale.recipe.data import DataRecipe
from flagscale.recipe.distillation import DistillationRecipe
from flagscale.recipe.model_steps import LayoutRecipe, ModelsRecipe
from flagscale.recipe.models import TeacherRecipe
from flagscale.recipe.parallelism import ParallelismRecipe
from flagscale.recipe.pretrained import SourceRecipe
from flagscale.recipe.promote import PromoteRecipe
from flagscale.recipe.quantization import QuantizationRecipe
from flagscale.recipe.reading import load_recipe, parse_section
from flagscale.recipe.recipe import Recipe
from flagscale.recipe.results import (
    EvaluationRecipe,
    ExportRecipe,
    ResourcesRecipe,
    TrackingRecipe,
)
from flagscale.recipe.search import SearchRecipe
from flagscale.recipe.section import Section, SectionT
from flagscale.recipe.student import ReconstructionRecipe, StudentRecipe
from flagscale.recipe.sweep import SweepRecipe
from flagscale.recipe.tasks import TasksRecipe
from flagscale.recipe.teacher_outputs import MetRecipe, TeacherOutputsRecipe
from flagscale.recipe.training import TrainingRecipe
from flagscale.recipe.variants import Variant

__all__ = [
    "ArchitectureRecipe",
    "DataRecipe",
    "DistillationRecipe",
    "EvaluationRecipe",
    "ExportRecipe",
    "LayoutRecipe",
    "MetRecipe",
    "ModelsRecipe",
    "ParallelismRecipe",
    "PromoteRecipe",
    "QuantizationRecipe",
    "Recipe",
    "ReconstructionRecipe",
    "ResourcesRecipe",
    "SearchRecipe",
    "Section",
    "SectionT",
    "SourceRecipe",
    "StudentRecipe",
    "SweepRecipe",
    "TasksRecipe",
    "TeacherOutputsRecipe",
    "TeacherRecipe",
    "TrackingRecipe",
    "TrainingRecipe",
    "Variant",
    "load_recipe",
    "parse_section",
]
