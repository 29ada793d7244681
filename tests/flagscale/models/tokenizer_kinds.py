"""Tokenizers of every kind that the families have, tiny, with what their files may hold."""

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def trained(pre_tokenizer: Any, special: list[str], normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics["lists"], topics["numbers"] * 3], trainer)
    return tokenizer


def split_and_bytes(pattern: str = SPLIT) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def gpt2_like() -> PreTrainedTokenizerFast:
    """A plain one, which says that spaces before punctuation are to be cleaned away."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=True,
        is_local=True,
        local_files_only=True,
    )


def with_prefix_space() -> PreTrainedTokenizerFast:
    """RoBERTa's way; transformers 4 takes the prefix away, if it is not told."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=True), ["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def llama3_like() -> PreTrainedTokenizerFast:
    """BOS by the post-processor; special tokens without names; its file cuts and pads."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = trained(split_and_bytes(), special)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20, pad_id=1, pad_token="<|end_of_text|>")
    tokenizer.add_tokens([AddedToken("<mark>", lstrip=True, rstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=131072,
        chat_template={"default": TEMPLATE, "tool_use": "tools: " + TEMPLATE},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
    )


def llama2_like() -> PreTrainedTokenizerFast:
    """SentencePiece's BPE: bytes for what is unknown, blanks as a letter, BOS and EOS."""
    letters = [*sorted(set(topics["lists"]) - {" ", "\n"}), "▁"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "s"), ("▁", "▁")]
    pieces += ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=TEMPLATE,
        legacy=False,
        sp_model_kwargs={},
    )


def qwen2_like() -> PreTrainedTokenizerFast:
    """Of its class: transformers 5 makes no other for a model of this family."""
    tokenizer = trained(
        split_and_bytes(SPLIT.replace("{1,3}", "")),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        normalizers.NFC(),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    maker.__name__: maker
    for maker in (gpt2_like, with_prefix_space, llama3_like, llama2_like, qwen2_like)
}
