import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flagscale.data.document_tokens import DocumentTokens, find_document_tokens, find_eod
from flagscale.errors import UserError

TURNS = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def tokenizer(
    *special: str,
    eos: str | None = None,
    template: str | None = None,
    around: str | None = None,
    **options: object,
) -> PreTrainedTokenizerFast:
    """One that knows these tokens and every byte; `around` is a post-processor's template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    if around:
        tokens = [(name, backend.token_to_id(name)) for name in special if name in around]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=tokens)
    built = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **options)
    built.chat_template = template
    return built


LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
R1 = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")


@pytest.mark.parametrize(
    ("special", "eos", "around", "eod", "bos"),
    [
        (LLAMA_3, "<|end_of_text|>", "<|begin_of_text|> $A", "<|end_of_text|>", LLAMA_3[0]),
        (LLAMA_3, "<|eot_id|>", "<|begin_of_text|> $A", "<|end_of_text|>", LLAMA_3[0]),
        (QWEN, "<|endoftext|>", None, "<|endoftext|>", None),
        (QWEN, "<|im_end|>", None, "<|endoftext|>", None),
        (("<s>", "</s>"), "</s>", "<s> $A", "</s>", "<s>"),
        (("<s>", "</s>"), "</s>", "<s> $A </s>", "</s>", "<s>"),  # add_eos_token
        (("<s>", "</s>", "<|im_end|>"), "<|im_end|>", "<s> $A", "</s>", "<s>"),  # OpenHermes
        ((*R1, "<|eot_id|>"), R1[1], f"{R1[0]} $A", R1[1], R1[0]),
        ((*LLAMA_3, "<|im_end|>"), "<|im_end|>", None, "<|end_of_text|>", None),  # Hermes 3
        (("<end>",), "<end>", None, "<end>", None),
    ],
)
def test_of_the_families(
    special: tuple[str, ...], eos: str, around: str | None, eod: str, bos: str | None
) -> None:
    built = tokenizer(*special, eos=eos, around=around)
    identifier = built.get_vocab()
    expected = DocumentTokens(identifier[eod], identifier[bos] if bos else None)
    assert find_document_tokens(built, None, "auto") == expected


@pytest.mark.parametrize(
    ("special", "eos", "template", "message"),
    [
        (("<|im_end|>",), "<|im_end|>", None, "EOS, '<.im_end.>', ends the turns"),
        (("<stop>",), "<stop>", "{{ messages }}<stop>", "EOS, '<stop>', ends the turns"),
        (
            (*LLAMA_3, "<|endoftext|>"),
            "<|eot_id|>",
            None,
            r"knows <\|endoftext\|> and <\|end_of_text\|>, and its EOS is '<\|eot_id\|>'",
        ),
        (("<x>",), None, None, "no EOS token, so one must be named"),
    ],
)
def test_an_eod_that_cannot_be_told(
    special: tuple[str, ...], eos: str | None, template: str | None, message: str
) -> None:
    built = tokenizer(*special, eos=eos, template=template)
    with pytest.raises(UserError, match=rf"data\.eod_token: .*{message}"):
        find_eod(built, None)
    assert find_eod(built, special[0]) == built.get_vocab()[special[0]]


def test_tokens_that_are_named() -> None:
    built = tokenizer(*LLAMA_3, eos="<|eot_id|>", around="<|begin_of_text|> $A")
    begin, end, turn = built.convert_tokens_to_ids(list(LLAMA_3))
    assert find_document_tokens(built, "<|eot_id|>", None) == (turn, None)
    assert find_document_tokens(built, None, "") == (end, None)
    assert find_document_tokens(built, "<|eot_id|>", "<|begin_of_text|>") == (turn, begin)
    with pytest.raises(UserError, match=r"eod_token='<\|endoftext\|>': not in .*'<\|end_of_text"):
        find_document_tokens(built, "<|endoftext|>", "auto")
    with pytest.raises(UserError, match=r"data.bos_token='<s>': not in the tokenizer's vocab"):
        find_document_tokens(built, None, "<s>")


def test_a_bos_that_cannot_be_told() -> None:
    two = tokenizer("[gMASK]", "<sop>", "</s>", eos="</s>", around="[gMASK] <sop> $A")
    with pytest.raises(UserError, match=r"data.bos_token: .*\['\[gMASK\]', '<sop>'\] in front"):
        find_document_tokens(two, None, "auto")
    same = tokenizer("<|endoftext|>", eos="<|endoftext|>", around="<|endoftext|> $A")
    with pytest.raises(UserError, match=r"are both '<\|endoftext\|>'"):
        find_document_tokens(same, None, "auto")
    assert find_document_tokens(same, None, "").bos is None


def test_files_that_do_not_agree_on_bos() -> None:
    built = tokenizer("<s>", "</s>", eos="</s>", bos_token="<s>")
    built.init_kwargs["add_bos_token"] = True
    with pytest.raises(UserError, match=r"add_bos_token is True in .* puts nothing in front"):
        find_document_tokens(built, None, "auto")
    assert find_document_tokens(built, None, "<s>").bos == built.bos_token_id
    built = tokenizer("<s>", "</s>", eos="</s>", around="<s> $A")
    built.init_kwargs["add_bos_token"] = False
    with pytest.raises(UserError, match=r"add_bos_token is False in .* puts <s> in front"):
        find_document_tokens(built, None, "auto")


def test_a_tokenizers_own_padding_is_no_bos() -> None:
    built = tokenizer("<pad>", "</s>", eos="</s>")
    built.backend_tokenizer.enable_padding(direction="left", length=8, pad_token="<pad>")
    assert find_document_tokens(built, None, "auto").bos is None
