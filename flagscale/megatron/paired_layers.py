"""The layers of student and teacher that distillation terms match: where they are, and how wide.

Names are Megatron-Core's, with layers counted over the whole model: `embedding`,
`decoder.layers.3`, `decoder.layers.3.mlp`, `decoder.final_layernorm`. A pair's two outputs meet on
the later of their two pipeline stages; what is earlier there travels with what the stages pass on
(`flagscale.megatron.pipeline_cargo`).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TypeAlias

from flagscale.errors import UserError
from flagscale.megatron.model_sizes import Sizes
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, ParallelismRecipe
from flagscale.recipe.layer_pairs import OF_HIDDEN_SIZE, SPLIT_OVER_TENSOR_RANKS, layer_of

EMBEDDING, FINAL_NORM = "embedding", "decoder.final_layernorm"
_PAIRS = "distillation.intermediate_layer_pairs"
_ATTENTION_PAIRS = "distillation.attention_layer_pairs"


@dataclass(frozen=True)
class PairedLayer:
    """One side of a pair, or of an attention pair one part of one side.

    Attributes:
        name: over the whole model.
        stage: of the pipeline, from 0, that computes it.
        local_name: on that stage, where layers count from 0 again.
        width: channels, of all tensor-parallel ranks together.
        part: `output`, or what goes into core attention: `query`, `key` or `value`, each with all
            its heads side by side; keys and values are repeated for the queries that share them.
    """

    name: str
    stage: int
    local_name: str
    width: int
    part: str = "output"

    @property
    def is_split(self) -> bool:
        """Whether tensor-parallel ranks have its channels, of all positions, between them."""
        return self.part != "output"


@dataclass(frozen=True)
class HiddenPair:
    """Two outputs that are matched token by token.

    Attributes:
        number: among the recipe's pairs.
        student: whose output is to become the teacher's.
        teacher: whose output it is held to.
        fit: `cosine` or `mse`.
    """

    number: int
    student: PairedLayer
    teacher: PairedLayer
    fit: str

    @property
    def name(self) -> str:
        """Of the term, in reports."""
        return f"{self.fit} of {self.student.name} to {self.teacher.name}"

    @property
    def stage(self) -> int:
        """Of the pipeline, where the two meet."""
        return max(self.student.stage, self.teacher.stage)

    @property
    def layers(self) -> list[tuple[str, PairedLayer]]:
        """What it is made of, each with whose it is."""
        return [("student", self.student), ("teacher", self.teacher)]

    @property
    def needs_projection(self) -> bool:
        """Whether the widths differ."""
        return self.student.width != self.teacher.width


@dataclass(frozen=True)
class AttentionPair:
    """Two layers' attentions that are matched.

    Attributes:
        number: among the recipe's pairs.
        student: the student's queries, keys or values, by part.
        teacher: the teacher's.
        fit: `kl`, `mse` or `cosine`.
    """

    number: int
    student: dict[str, PairedLayer]
    teacher: dict[str, PairedLayer]
    fit: str

    @property
    def name(self) -> str:
        """Of the term, in reports."""
        ours, theirs = (next(iter(one.values())).name for one in (self.student, self.teacher))
        return f"{self.fit} of attention in {ours} to {theirs}"

    @property
    def stage(self) -> int:
        """Of the pipeline, where the two meet."""
        return max(layer.stage for _, layer in self.layers)

    @property
    def layers(self) -> list[tuple[str, PairedLayer]]:
        """What it is made of, each with whose it is."""
        return [
            (who, layer)
            for who, parts in (("student", self.student), ("teacher", self.teacher))
            for layer in parts.values()
        ]


Pair: TypeAlias = HiddenPair | AttentionPair


def hidden_pairs(
    distillation: DistillationRecipe, student: Sizes, teacher: Sizes, stages: int
) -> list[HiddenPair]:
    """The recipe's intermediate pairs in two models.

    Args:
        distillation: the recipe's section.
        student: its sizes.
        teacher: its sizes.
        stages: of the pipeline; divides both models' layers.

    Raises:
        UserError: a layer that does not exist, or whose output cannot be compared.
    """
    pairs = []
    for number, (ours, theirs, *fit) in enumerate(distillation.intermediate_layer_pairs):
        pairs.append(
            HiddenPair(
                number,
                paired_layer(ours, student, stages, f"{_PAIRS}: {ours!r} of the student"),
                paired_layer(theirs, teacher, stages, f"{_PAIRS}: {theirs!r} of the teacher"),
                fit[0] if fit else "cosine",
            )
        )
    return pairs


def attention_pairs(
    distillation: DistillationRecipe, student: Sizes, teacher: Sizes, stages: int
) -> list[AttentionPair]:
    """The recipe's attention pairs in two models.

    Args:
        distillation: the recipe's section.
        student: its sizes.
        teacher: its sizes.
        stages: of the pipeline; divides both models' layers.

    Raises:
        UserError: a layer that does not exist, or whose heads cannot be split as they must be.
    """
    parts = dict.fromkeys(
        part for relation in distillation.attention_relations for part in relation.split("_")
    )
    heads = distillation.attention_relation_heads or student.num_attention_heads
    pairs = []
    for number, (ours, theirs) in enumerate(distillation.attention_layer_pairs):
        sides = []
        for who, sizes, layer in (("student", student, ours), ("teacher", teacher, theirs)):
            where = f"{_ATTENTION_PAIRS}: layer {layer} of the {who}"
            found = paired_layer(f"decoder.layers.{layer}", sizes, stages, where)
            width = sizes.num_attention_heads * sizes.kv_channels
            if width % heads:
                raise UserError(
                    f"{where}: its {sizes.num_attention_heads} heads of {sizes.kv_channels} "
                    f"channels cannot be split into {heads}; set distillation."
                    f"attention_relation_heads to a divisor of {width}, in both models"
                )
            core = f"{found.local_name}.self_attention.core_attention"
            sides.append(
                {p: PairedLayer(found.name, found.stage, core, width, part=p) for p in parts}
            )
        pairs.append(AttentionPair(number, sides[0], sides[1], distillation.attention_fit))
    return pairs


def paired_layer(name: str, sizes: Sizes, stages: int, where: str) -> PairedLayer:
    """Where a model has a module, and how wide its output is.

    Args:
        name: of the module.
        sizes: of the model.
        stages: of the pipeline.
        where: whose name it is, for people.

    Raises:
        UserError: there is none, or its output is not one vector a token.
    """
    if name == EMBEDDING:
        return PairedLayer(name, 0, name, sizes.hidden_size)
    if name == FINAL_NORM:
        return PairedLayer(name, stages - 1, name, sizes.hidden_size)
    if name == "output_layer":
        raise UserError(f"{where}: logits are matched by the distillation loss itself")
    layer = layer_of(name)
    if layer is None:
        raise UserError(
            f"{where}: must be {EMBEDDING}, {FINAL_NORM}, or decoder.layers.N with or without one "
            "of its modules"
        )
    number, inside = layer
    if number >= sizes.num_layers:
        raise UserError(f"{where}: it has layers 0 to {sizes.num_layers - 1}")
    width = _width(sizes, inside)
    if width is None:
        raise UserError(f"{where}: {_hint(inside)}")
    stage = number * stages // sizes.num_layers
    local = number - stage * sizes.num_layers // stages
    tail = f".{inside}" if inside else ""
    return PairedLayer(name, stage, f"decoder.layers.{local}{tail}", width)


def check_paired_layers(
    distillation: DistillationRecipe,
    student: ModelShape,
    teacher: ModelShape,
    sizes: ParallelismRecipe,
) -> None:
    """Refuse pairs of layers that do not exist, or cannot be compared.

    Raises:
        UserError: which layer, of which model, and the layers to choose from.
    """
    hidden_pairs(distillation, student, teacher, sizes.pipeline_model_parallel_size)
    attention_pairs(distillation, student, teacher, sizes.pipeline_model_parallel_size)
    heads = distillation.attention_relation_heads or student.num_attention_heads
    if distillation.attention_layer_pairs and heads % sizes.tensor_model_parallel_size:
        raise UserError(
            f"{_ATTENTION_PAIRS}: {heads} heads with training.parallelism."
            f"tensor_model_parallel_size={sizes.tensor_model_parallel_size}: each rank has whole "
            "heads; set distillation.attention_relation_heads to a multiple"
        )
    for who, shape in (("student", student), ("teacher", teacher)):
        architecture = shape.architecture
        if distillation.attention_layer_pairs and (
            architecture.multi_latent_attention or architecture.heterogeneous_layers_config
        ):
            raise UserError(
                f"{_ATTENTION_PAIRS}: the {who} has multi_latent_attention or layers of several "
                "kinds, and attention is matched where all heads are alike; pair hidden states "
                "(intermediate_layer_pairs)"
            )
    for ours, theirs, *_ in distillation.intermediate_layer_pairs:
        for who, shape, name in (("student", student, ours), ("teacher", teacher, theirs)):
            layer = layer_of(name)
            if layer is not None and not _has_module(shape, *layer):
                raise UserError(
                    f"{_PAIRS}: {name!r} of the {who}: layer {layer[0]} has no {layer[1]} of the "
                    "one form that is compared; pair whole layers, self_attention or mlp"
                )


def _width(sizes: Sizes, inside: str) -> int | None:
    """Channels of what a layer's module returns; None if there is no such module."""
    if not inside or inside in OF_HIDDEN_SIZE:
        return sizes.hidden_size
    heads, groups = sizes.num_attention_heads, sizes.num_query_groups
    widths = {
        "self_attention.linear_qkv": (heads + 2 * groups) * sizes.kv_channels,
        "self_attention.core_attention": heads * sizes.kv_channels,
        "mlp.linear_fc1": 2 * sizes.ffn_hidden_size,
    }
    return widths.get(inside)


def _has_module(shape: ModelShape, number: int, inside: str) -> bool:
    """Whether a layer of the architecture has the module, as wide as in a plain one."""
    architecture = shape.architecture
    has_experts = architecture.num_experts and number % architecture.moe_layer_freq == 0
    if has_experts and inside.startswith("mlp."):
        return False
    if inside in ("", "self_attention", "mlp"):
        return True
    if architecture.heterogeneous_layers_config is not None:
        return False
    return inside in OF_HIDDEN_SIZE or not architecture.multi_latent_attention


def _hint(inside: str) -> str:
    known = (*OF_HIDDEN_SIZE, *SPLIT_OVER_TENSOR_RANKS)
    if near := difflib.get_close_matches(inside, known, n=1):
        return f"no module there is called {inside}; did you mean {near[0]}?"
    return f"{inside} cannot be compared token by token; there are {', '.join(known)}"
