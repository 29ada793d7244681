"""Section `data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flagscale.recipe.section import Fraction, PositiveInt, Section


class DataRecipe(Section):
    """Which text, how it is split and packed."""

    source: str = Field(
        "python-docs",
        description="'python-docs', a file, folder, glob or fsspec URL, or a Hugging Face dataset",
    )
    format: Literal["auto", "text", "jsonl", "parquet", "huggingface", "python-docs"] = Field(
        "auto",
        description="auto: by the source's name (.txt/.md, .jsonl, .parquet; else a dataset)",
    )
    text_field: str = Field("text", description="Key or column of the text in structured sources")
    subset: str | None = Field(None, description="Hugging Face dataset configuration")
    split: str = Field("train", description="Hugging Face dataset split to read")
    revision: str | None = Field(None, description="Hugging Face dataset revision")
    fingerprint: str | None = Field(
        None, description="Changes when a local source changes; filled in by `pipelines run`"
    )
    tokenizer: str | None = Field(None, description="Default: the teacher's")
    tokenizer_revision: str | None = None
    eod_token: str | None = Field(
        None, description="Token between documents; default: <|endoftext|> if known, else EOS"
    )
    seq_length: Annotated[int, Field(ge=8)] = Field(256, description="Tokens a sample")
    validation_fraction: Fraction = Field(0.05, description="Share of documents, by hash")
    test_fraction: Fraction = Field(0.05, description="Share of documents, by hash")
    max_documents: PositiveInt | None = Field(None, description="Read no more than this many")
    workers: PositiveInt | None = Field(None, description="Tokenising threads; default: cores")

    @model_validator(mode="after")
    def _check(self) -> DataRecipe:
        for name in ("validation_fraction", "test_fraction"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 leaves nothing to measure on; try 0.05")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction="
                f"{self.test_fraction} leave no training documents; their sum must be below 1"
            )
        return self
