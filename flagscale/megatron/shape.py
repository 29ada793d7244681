"""The shape of a model: what `model.json` of an artifact holds, under Megatron's argument names.

`from_hf_config` reads it off a Hugging Face configuration of one of `flagscale.megatron.families`,
and `hf_config_for` turns it back into one. `flagscale.models.student_shape` derives the student's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.artifacts import write_json
from flagscale.errors import UserError
from flagscale.megatron.config_fields import check_fields, read_rope
from flagscale.megatron.families import family_of, read_experts, write_experts
from flagscale.recipe import ArchitectureRecipe, parse_section
from flagscale.recipe.quantization import FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_JSON = "model.json"
QUANTIZERS = "quantizers.safetensors"  # beside it, of a quantised student
VOCABULARY_DIVISOR = 128  # Megatron's `make_vocab_size_divisible_by`


@dataclass(frozen=True)
class ModelShape:
    """Everything that fixes a GPT model but its weights.

    Attributes:
        model_type: Hugging Face family, see `flagscale.megatron.families`.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width inside the gated MLP.
        num_attention_heads: query heads.
        num_query_groups: key/value heads; divides the query heads.
        kv_channels: width of one head.
        vocab_size: tokens that the model knows (Hugging Face's `vocab_size`).
        padded_vocab_size: rows of the embedding in Megatron-Core; those past `vocab_size` are
            padding and never reach a loss or an export.
        max_position_embeddings: longest sequence, in tokens; 0: not known.
        norm_epsilon: of every norm.
        rotary_base: RoPE's theta.
        use_rope_scaling: Llama 3's RoPE scaling.
        rope_scaling_factor: its factor.
        qk_layernorm: norm on every query and key head; with latent attention, on the latents.
        add_qkv_bias: bias on the query, key and value projections.
        untie_embeddings_and_output_weights: whether the output layer has weights of its own.
        architecture: what it has beyond attention and one MLP a layer.
        quantization: recipe by which its linear layers are quantised, see
            `flagscale.recipe.quantization.FORMATS`; None: they are not.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = False
    architecture: ArchitectureRecipe = field(default_factory=ArchitectureRecipe)
    quantization: str | None = None

    def save(self, artifact: Path) -> None:
        """Write `model.json` into an artifact's folder."""
        values = asdict(self) | {"architecture": self.architecture.model_dump(mode="json")}
        if self.quantization is None:
            del values["quantization"]
        write_json(artifact / MODEL_JSON, values)

    @classmethod
    def load(cls, artifact: Path) -> ModelShape:
        """Read `model.json` of an artifact.

        Raises:
            UserError: the file is missing, no JSON, or has other fields than this class and
                `ArchitectureRecipe`.
        """
        path = artifact / MODEL_JSON
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a model's shape: {error}") from error
        names = {item.name for item in fields(cls)} - {"quantization"}  # of some alone
        if not isinstance(values, dict) or values.keys() - {"quantization"} != names:
            raise UserError(f"{path}: must hold exactly the fields {', '.join(sorted(names))}")
        if values.get("quantization", "fp8") not in FORMATS:
            raise UserError(
                f"{path}: quantization={values['quantization']!r}: must be {', '.join(FORMATS)}"
            )
        values["architecture"] = parse_section(
            ArchitectureRecipe, values["architecture"], where=f"{path}, architecture"
        )
        return cls(**values)

    def with_vocabulary(self, vocab_size: int) -> ModelShape:
        """The same model without the rows of its vocabulary that are no tokens.

        Models' embeddings are padded, and not all alike: of Qwen2.5's 151,665 tokens to 151,936
        rows in small models, to 152,064 in large ones. No text ever has these rows' ids.

        Args:
            vocab_size: tokens of the tokenizer, which may know more than the model.
        """
        return self.with_rows(min(vocab_size, self.vocab_size))

    def with_rows(self, vocab_size: int) -> ModelShape:
        """The same model with a vocabulary of another size."""
        padded = pad_vocab_size(vocab_size, VOCABULARY_DIVISOR)
        return replace(self, vocab_size=vocab_size, padded_vocab_size=padded)

    def check_seq_length(self, seq_length: int, who: str = "teacher") -> None:
        """Refuse sequences that are longer than the model's positions.

        Args:
            seq_length: tokens a sample.
            who: it is, for people.

        Raises:
            UserError: both numbers.
        """
        if 0 < self.max_position_embeddings < seq_length:
            raise UserError(
                f"data.seq_length={seq_length} is more than the {who}'s "
                f"max_position_embeddings={self.max_position_embeddings}"
            )

    @property
    def fits_hugging_face(self) -> bool:
        """Whether a Hugging Face configuration of its family describes the model."""
        return family_of(self.model_type).holds(self.architecture)

    def check_fits_hugging_face(self) -> None:
        """Refuse a model that its family's Hugging Face configuration cannot describe.

        Raises:
            UserError: what does not fit, and the format to export in.
        """
        if self.quantization is not None and not FORMATS[self.quantization].huggingface:
            raise UserError(
                f"student.quantization.recipe={self.quantization}: ModelOpt's unified Hugging Face "
                "format is not written of that; set export.format=megatron"
            )
        if not self.fits_hugging_face:
            changed = self.architecture.model_dump(mode="json", exclude_defaults=True)
            raise UserError(
                f"student.architecture={changed}: no {self.model_type} configuration of Hugging "
                "Face holds that; set export.format=megatron"
            )


def pad_vocab_size(vocab_size: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that holds `vocab_size` tokens."""
    return -(-vocab_size // divisor) * divisor


def from_hf_config(
    config: PreTrainedConfig,
    make_vocab_size_divisible_by: int = VOCABULARY_DIVISOR,
    ignored: Collection[str] = (),
    who: str = "teacher",
) -> ModelShape:
    """Read the shape off a Hugging Face configuration.

    Args:
        config: of a causal language model.
        make_vocab_size_divisible_by: the embedding gets padding rows up to a multiple of this.
        ignored: unknown fields of the configuration that are not refused, see `check_fields`.
        who: whose it is, `teacher` or `student`: the section of the recipe that names the model.

    Raises:
        UserError: another family, or a feature that the Megatron-Core model would not honour.
    """
    family = config.model_type
    entry = family_of(family, who)
    check_fields(config, entry, ignored, who)
    base, factor = read_rope(config, who)
    heads = config.num_attention_heads
    if not getattr(config, "head_dim", None):
        check_divides(f"{family} {who}", "hidden_size", config.hidden_size, heads)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise UserError(
            f"{family} {who}: num_attention_heads={heads} is not divisible by "
            f"num_key_value_heads={groups}"
        )
    return ModelShape(
        model_type=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        padded_vocab_size=pad_vocab_size(config.vocab_size, make_vocab_size_divisible_by),
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rotary_base=base,
        use_rope_scaling=factor is not None,
        rope_scaling_factor=factor or 8.0,
        qk_layernorm=entry.qk_layernorm,
        add_qkv_bias=entry.add_qkv_bias,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        architecture=read_experts(config, who) if entry.has_experts else ArchitectureRecipe(),
    )


def hf_config_for(shape: ModelShape, template: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `template` (the teacher's configuration) that describes `shape`.

    What a shape does not hold (special token ids, activation, initialisation) stays as it is.

    Raises:
        UserError: the family has no such model.
    """
    shape.check_fits_hugging_face()
    family = family_of(shape.model_type)
    config = copy.deepcopy(template)
    for stale in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(stale, None)
    config.architectures = [family.causal_lm]
    config.num_hidden_layers = shape.num_layers
    config.hidden_size = shape.hidden_size
    config.intermediate_size = shape.ffn_hidden_size
    config.num_attention_heads = shape.num_attention_heads
    config.num_key_value_heads = shape.num_query_groups
    config.head_dim = shape.kv_channels
    config.vocab_size = shape.vocab_size
    config.tie_word_embeddings = not shape.untie_embeddings_and_output_weights
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * shape.num_layers
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = shape.num_layers
    if family.has_experts:
        write_experts(config, shape.architecture, shape.ffn_hidden_size)
    return config


def check_divides(where: str, name: str, value: int, heads: int) -> None:
    """Refuse a size that heads cannot share evenly.

    Raises:
        UserError: what, where.
    """
    if value % heads:
        raise UserError(f"{where}: {name}={value} is not divisible by num_attention_heads={heads}")
