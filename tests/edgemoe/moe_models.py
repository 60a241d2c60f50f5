"""What the tests of stores and engines share: saved models of every family, and the same in memory."""

from __future__ import annotations

import torch

from poise.models.serving import InMemory
from poise.models.tokenizers import ByteTokenizer
from poise.testing.families import tiny

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "granitemoe",
            "gpt_oss", "phimoe", "switch_transformers")
RAW = {torch.float32: 32, torch.bfloat16: 16}


def saved(folder, family="mixtral", dtype=torch.float32, **options):
    """Write a tiny model and its tokenizer as transformers does; return the directory."""
    model = tiny(family, **options).to(dtype)
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def reference(folder, dtype=torch.float32, context=64):
    """Return a saved model in memory, on transformers' plain loop over experts."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    seq2seq = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=dtype).eval()
    if not seq2seq:
        model.set_experts_implementation("eager")
    return InMemory(model, ByteTokenizer(), context=context)


def ids(rows=1, length=9, seed=0):
    """Return token ids (rows, length)."""
    return torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def contents(store):
    """Return every file of a store as bytes, by name."""
    return {p.name: p.read_bytes() for p in sorted(store.iterdir())}


def names(folder):
    """Return what lies in a folder."""
    return {p.name for p in folder.iterdir()}
