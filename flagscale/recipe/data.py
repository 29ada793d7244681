"""Section `data`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flagscale.recipe.chat_template import read_template, variables
from flagscale.recipe.section import (
    Fraction,
    Line,
    NonNegativeInt,
    PositiveInt,
    Scale,
    Section,
    Source,
    Text,
    Token,
    Width,
)

_DEFAULT_SOURCE = "python-docs"
# What transformers' `apply_chat_template` gives a template by these names, or takes for itself.
_GIVEN = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask", "tokenize"),
}
_SMALLEST_FRACTION = 1e-9
_FEWEST_DOCUMENTS = 4  # one to train on, one to validate, two to test: intervals need two


class _Reading(Section):
    """How the documents of a corpus are read."""

    format: Literal[
        "auto",
        "text",
        "jsonl",
        "parquet",
        "csv",
        "tsv",
        "arrow",
        "huggingface",
        "python-docs",
        "chat",
    ] = Field(
        "auto",
        description="auto: by the source's name (.txt/.md, .jsonl, .parquet, ...; else a dataset); "
        "chat: conversations, in files and datasets as auto finds them",
    )
    text_field: Line = Field("text", description="Key or column of the text in structured sources")
    messages_field: Line = Field(
        "messages",
        description="chat: key or column of the [{role, content}, ...]; where `messages` is not "
        "there, ShareGPT's `conversations`",
    )
    subset: Line | None = Field(None, description="Hugging Face dataset configuration")
    split: Line = Field("train", description="Split of a Hugging Face dataset or folder to read")
    revision: Line | None = Field(None, description="Hugging Face dataset revision")
    max_documents: PositiveInt | None = Field(None, description="Read no more than this many")
    max_bad_rows: NonNegativeInt | None = Field(
        None,
        description="Rows that cannot be used are left out up to this many; default: 0.1% of the "
        "rows, and at least 10",
    )


class CorpusRecipe(_Reading):
    """One corpus of several."""

    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9_-]*[a-z0-9])?$", max_length=63, description="In file names"
    )
    source: Source = Field(description="As data.source")
    weight: Scale = Field(
        1.0, description="Share of the training samples, relative to the other corpora's"
    )


class DataRecipe(_Reading):
    """Which text, how it is split and packed."""

    source: Source | None = Field(
        _DEFAULT_SOURCE,
        description="'python-docs', a file, folder, glob or fsspec URL, or a Hugging Face dataset; "
        "null where there is a blend",
    )
    blend: list[CorpusRecipe] | None = Field(
        None, description="Several corpora, trained on in proportion to their weights"
    )
    fingerprint: Text | None = Field(
        None, description="Changes when a local source changes; filled in by `pipelines run`"
    )
    tokenizer: Source | None = Field(None, description="Default: the teacher's")
    tokenizer_revision: Line | None = None
    eod_token: Token | None = Field(
        None,
        description="Token after each document; default: EOS, or what ended documents where EOS "
        "ends turns",
    )
    bos_token: Text | None = Field(
        "auto",
        description="Token before each document; auto: the one that the tokenizer puts before a "
        "text; null or '': none",
    )
    chat_template: Text | None = Field(
        None,
        description="chat: the text of a chat template, or a file with it; default: the "
        "tokenizer's. Exported with the student",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="chat: further variables of the template (enable_thinking: false, ...)"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="chat: learn every answer of a conversation, or its last alone"
    )
    seq_length: Annotated[Width, Field(ge=8)] = Field(256, description="Tokens a sample")
    validation_fraction: Fraction = Field(0.05, description="Share of documents, by hash")
    test_fraction: Fraction = Field(0.05, description="Share of documents, by hash")
    workers: Annotated[PositiveInt, Field(le=1024)] | None = Field(
        None, description="Tokenising threads; default: cores"
    )

    @property
    def corpora(self) -> list[CorpusRecipe]:
        """What is read: the corpora of the blend, or one by the name of `corpus`."""
        if self.blend is not None:
            return self.blend
        reading = {name: getattr(self, name) for name in _Reading.model_fields}
        assert self.source is not None
        return [CorpusRecipe(name="corpus", source=self.source, **reading)]

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, value: str | None) -> str | None:
        """Of a file its text: the steps may run where the file is not."""
        return None if value is None else read_template(value)

    @model_validator(mode="after")
    def _check_conversations(self) -> DataRecipe:
        given = self.chat_template_kwargs
        if self.blend is not None or self.source is not None:
            chat_only = ("chat_template", "chat_template_kwargs", "train_on")
            changed = [
                n for n in chat_only if getattr(self, n) != type(self).model_fields[n].default
            ]
            if changed and not any(corpus.format == "chat" for corpus in self.corpora):
                raise ValueError(
                    f"{', '.join(changed)}: does nothing without conversations; set format: chat, "
                    "or leave it out"
                )
        taken = sorted(_GIVEN & given.keys())
        if taken:
            raise ValueError(
                f"chat_template_kwargs: {', '.join(taken)}: comes from the rows or from the step "
                "itself; give other variables of the template"
            )
        if self.chat_template is not None:
            unknown = sorted(given.keys() - variables(self.chat_template))
            if unknown:
                raise ValueError(
                    f"chat_template_kwargs: {', '.join(unknown)}: the chat template knows no such "
                    f"variable; it has: {', '.join(sorted(variables(self.chat_template)))}"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _no_default_source(cls, values: Any) -> Any:  # noqa: ANN401 - whatever YAML held
        """The default text is not meant to be beside a blend."""
        if isinstance(values, dict) and values.get("blend") is not None:
            return {"source": None, **values}
        return values

    @model_validator(mode="after")
    def _check_source(self) -> DataRecipe:
        if self.blend is None:
            if self.source is None:
                raise ValueError("source=null and no blend: give one of the two")
            return self
        if self.source is not None:
            raise ValueError(f"source={self.source!r} and blend are both given; give one of them")
        if not self.blend:
            raise ValueError("blend=[]: name at least one corpus, or give source instead")
        for name, field in _Reading.model_fields.items():
            if getattr(self, name) != field.default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does nothing beside blend; give it in the "
                    "corpora that it is meant for"
                )
        names = Counter(corpus.name for corpus in self.blend)
        repeated = [name for name, count in names.items() if count > 1]
        if repeated:
            raise ValueError(f"blend: {', '.join(repeated)}: names must differ from one another")
        return self

    @model_validator(mode="after")
    def _check(self) -> DataRecipe:
        for name in ("validation_fraction", "test_fraction"):
            if getattr(self, name) < _SMALLEST_FRACTION:
                raise ValueError(
                    f"{name}={getattr(self, name):g} leaves nothing to measure on; try 0.05"
                )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction="
                f"{self.test_fraction} leave no training documents; their sum must be below 1"
            )
        most = [corpus.max_documents for corpus in self.corpora]
        known = [count for count in most if count is not None]
        if len(known) == len(most) and sum(known) < _FEWEST_DOCUMENTS:
            raise ValueError(
                f"max_documents={sum(known)}: training, validation and test together need at least "
                f"{_FEWEST_DOCUMENTS} documents"
            )
        return self
