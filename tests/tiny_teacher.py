"""A tiny Llama that has learnt a little English, for tests: `python tests/tiny_teacher.py FOLDER`.

4 layers, hidden size 64, 4 heads, 2 key/value heads, MLP 128, tied embeddings, a byte-level BPE of
1000 tokens. Deterministic; about ten seconds on 2 cores.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOD = "<|endoftext|>"
VOCAB_SIZE = 1000


def text() -> list[str]:
    return [topics[name] for name in sorted(topics)]


def make_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD, pad_token=EOD)


def make_teacher(folder: Path, steps: int = 300) -> float:
    """Write the model and its tokenizer; returns the last training loss, nats a token."""
    torch.set_num_threads(1)  # more only wait for each other, at this size
    documents = text()
    tokenizer = make_tokenizer(documents)
    ids = torch.tensor(tokenizer("".join(documents))["input_ids"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 65, (8,), generator=draw)
        batch = torch.stack([ids[start : start + 65] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()


if __name__ == "__main__":
    sys.stdout.write(f"loss {make_teacher(Path(sys.argv[1])):.3f} nats a token\n")
