"""An OLMoE-shaped model with random weights in files, larger than memory if need be, to measure on.

Speed, memory and reads do not depend on what weights say, only on their shapes and on who is routed where.
The latter is random too, by hidden states that are: all experts alike, whatever the token before used. Or
it is replayed (`poise_edgemoe.replay`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError, require
from poise.files import make_folder, sync_folder, write_json, write_shards
from poise.runs.context import seed_for

SPREAD = 0.02  # standard deviation of weights, as models are initialised
# of embeddings: what a token is must outweigh what attention mixes, the same for all tokens, or deep layers
# send every token to the same few experts, which no trained router does (EdgeMoE section II-B)
EMBEDDED = 1.0
SHARD = 1 << 29  # bytes of a file; two of them are in memory


def write_olmoe(
    path: Path | str, *, layers: int = 6, hidden: int = 2048, inner: int = 1024, experts: int = 64,
    top: int = 8, vocab: int = 16384, context: int = 4096, seed: int = 0,
) -> Path:
    """Write a model as a transformers directory in bfloat16, file by file, never as a whole in memory.

    The defaults are OLMoE-1B-7B's sizes but for 6 of its 16 layers and a vocabulary of 16,384: 5.2 GB. Each
    tensor is drawn from a stream of its own, of the seed and its name: equal options give equal bytes.

    Parameters
    ----------
    path : path
        The folder to make; it must not exist, and is not there before it is whole.
    hidden, inner : int
        Width of the model (heads of 128, or one), and of an expert.
    experts, top : int
        Of each layer, and how many of them a token uses.
    context : int
        Most tokens.

    Raises
    ------
    ConfigError
        For a path that exists, or a size that is no whole number >= 1, or more of `top` than of `experts`.
    FileError
        When the folder cannot be written.
    """
    path = Path(path)
    sizes = {"layers": layers, "hidden": hidden, "inner": inner, "experts": experts, "top": top,
             "vocab": vocab, "context": context}
    _check(path, sizes)
    config = _config(**sizes)
    partial = path.with_name(f"{path.name}.partial")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed={seed!r} is not allowed: it must be a whole number from 0")
    try:
        make_folder(path.parent)
        partial.mkdir()
        with removed_on_failure(partial):
            write_shards(_tensors(config, seed), partial, shard_bytes=SHARD)
            write_json(partial / "config.json", config.to_dict())
            os.rename(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"cannot write {partial}: {error.strerror or error}") from error
    return path


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Leave no folder behind that is not whole."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check(path: Path, sizes: dict[str, int]) -> None:
    for taken in (path, path.with_name(f"{path.name}.partial")):
        if taken.exists() or taken.is_symlink():
            raise ConfigError(f"{taken} exists: remove it first, or name another folder")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}={size!r} is not allowed: it must be a whole number >= 1")
    if sizes["top"] > sizes["experts"]:
        raise ConfigError(f"top={sizes['top']} is not allowed: there are {sizes['experts']} experts")


def _config(
    *, layers: int, hidden: int, inner: int, experts: int, top: int, vocab: int, context: int
) -> Any:
    transformers = require("transformers", "edgemoe")
    heads = hidden // 128 if hidden % 128 == 0 else 1
    return transformers.OlmoeConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_experts=experts,
        num_experts_per_tok=top, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocab,
        max_position_embeddings=context, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["OlmoeForCausalLM"])


def _tensors(config: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its name on disk, one at a time."""
    for name, shape in _shapes(config):
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            draw = torch.Generator().manual_seed(seed_for(seed, name))
            spread = EMBEDDED if name == "model.embed_tokens.weight" else SPREAD
            yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread, generator=draw)


def _shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    yield "model.embed_tokens.weight", (vocab, hidden)
    for n in range(config.num_hidden_layers):
        block = f"model.layers.{n}"
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            yield f"{block}.{norm}.weight", (hidden,)
        for matrix in "qkvo":
            yield f"{block}.self_attn.{matrix}_proj.weight", (hidden, hidden)
        yield f"{block}.mlp.gate.weight", (config.num_experts, hidden)
        for e in range(config.num_experts):
            yield f"{block}.mlp.experts.{e}.gate_proj.weight", (inner, hidden)
            yield f"{block}.mlp.experts.{e}.up_proj.weight", (inner, hidden)
            yield f"{block}.mlp.experts.{e}.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
