"""What a memory limit is spent on, computed before anything is loaded (EdgeMoE section III-A; ours)."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from poise.errors import ConfigError
from poise.models.serving import context_of
from poise_edgemoe.cache.slots import STAGES, size_of
from poise_edgemoe.loading import hot_files, read_config
from poise_edgemoe.store.index import Index, read_index

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MOST_CHUNK, LEAST_CHUNK = 512, 8  # tokens of a prompt that are computed at a time
KERNELS = 16 << 20  # most that kernels for a model's shapes take, and what the allocator keeps
SHARE = 0.25  # of what a limit leaves beside all else that a chunk may take, where a smaller one would do


@dataclass(frozen=True)
class Budget:
    """How the bytes of an engine are shared out.

    Parameters
    ----------
    hot : int
        Weights that stay in memory.
    kv : int
        Keys and values of `batch` rows of `context` tokens.
    workspace : int
        What is computed with: activations of a chunk, one expert's matrices in full.
    index : int
        The index of the store and the policy's tables.
    staging : int
        Experts that are read without being kept.
    experts : int
        Experts in memory, `staging` included.
    """

    hot: int
    kv: int
    workspace: int
    index: int
    staging: int
    experts: int
    context: int
    batch: int
    chunk: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.hot + self.kv + self.workspace + self.index + self.experts

    def terms(self) -> dict[str, int]:
        """Return every term in bytes, and the sum."""
        return {**asdict(self), "total": self.total}


def parse_bytes(said: str | int) -> int:
    """Return the bytes of "900MB", "4 GB", "1.5GiB" or a number."""
    hit = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?i?B?)\s*", str(said))
    unit = {"KB": "kB"}.get(hit[2], hit[2]) if hit else ""
    if hit is None or unit not in UNITS or isinstance(said, bool):
        raise ConfigError(f"{said!r} is no number of bytes: write 900MB, 4GB or 1.5GiB")
    return int(float(hit[1]) * UNITS[unit])


def plan_memory(
    path: Path | str, *, memory: str | int | None = None, total: str | int | None = None,
    context: int | None = None, batch: int = 1,
) -> Budget:
    """Return how a limit is shared out; see `Engine.open`.

    Raises
    ------
    ConfigError
        When the limit is too small, with the smallest workable value.
    """
    index = read_index(path)
    config = read_config(Path(path))
    context = _context(context, config)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch={batch!r} is not allowed: it must be a whole number >= 1")
    if memory is not None and total is not None:
        raise ConfigError("memory and total are both given: give one of them")
    every = sum(size_of(m) for _, _, m in index.blobs())
    limit = None if memory is None and total is None else _limit(memory, total)
    fixed = _fixed(index, config, Path(path), context, batch, limit)
    largest = fixed.staging // STAGES
    limit = fixed.total + every if limit is None else limit
    if limit < (least := fixed.total + largest):
        given = f"memory={memory}" if total is None else f"total={total}"
        smallest = least + (0 if total is None else resident_bytes())
        raise ConfigError(f"{given} is too small: the smallest workable value is {-(-smallest // 10**6)}MB "
                          f"(hot weights {fixed.hot / 1e6:.0f}, keys and values {fixed.kv / 1e6:.0f}, "
                          f"workspace {fixed.workspace / 1e6:.0f}, one expert {largest / 1e6:.1f}, two "
                          f"being read {fixed.staging / 1e6:.1f})")
    return Budget(**{**asdict(fixed), "experts": fixed.experts + min(limit - fixed.total, every)})


def _limit(memory: str | int | None, total: str | int | None) -> int:
    if total is None:
        assert memory is not None
        return parse_bytes(memory)
    return parse_bytes(total) - resident_bytes()


def resident_bytes() -> int:
    """Return what the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _context(context: int | None, config: Any) -> int:
    most = context_of(config)
    if context is None:
        return most
    given = getattr(config, "max_position_embeddings", None) or context
    if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= given:
        raise ConfigError(f"context={context!r} is not allowed: it must lie between 1 and {given} tokens")
    return context


def _fixed(
    index: Index, config: Any, folder: Path, context: int, batch: int, limit: int | None
) -> Budget:
    """Return all terms but experts that are kept; a chunk is as long as the limit allows."""
    staging, dtype = STAGES * max(size_of(m) for _, _, m in index.blobs()), getattr(torch, index.dtype)
    hot = sum(p.stat().st_size for p in hot_files(folder, index))
    kv = kv_bytes(config, dtype) * context * batch
    matrices = _matrices(index, config, dtype) + min(KERNELS, 2 * hot)
    tables = 2048 * sum(len(layer.experts) for layer in index.layers)
    chunk, left = min(context, MOST_CHUNK), math.inf
    if limit is not None:
        left = limit - hot - kv - matrices - tables - staging
    while chunk > LEAST_CHUNK and _activations(index, config, dtype, chunk * batch, context) > SHARE * left:
        chunk = max(LEAST_CHUNK, chunk // 2)
    # a layer's keys and values are laid out anew when they grow
    again = 4 * kv // (getattr(config, "num_hidden_layers", None) or config.num_decoder_layers)
    workspace = matrices + again + _activations(index, config, dtype, chunk * batch, context)
    return Budget(hot, kv, workspace, tables, staging, staging, context, batch, chunk)


def kv_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return bytes of keys and values a token, of all layers."""
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    if getattr(config, "kv_lora_rank", None):  # DeepSeek keeps them unfolded
        width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        return config.num_hidden_layers * width * dtype.itemsize
    if config.is_encoder_decoder:  # of the decoder, and of the encoder's tokens for it
        return 4 * config.num_decoder_layers * heads * config.d_kv * dtype.itemsize
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * size * dtype.itemsize


def _activations(index: Index, config: Any, dtype: torch.dtype, tokens: int, context: int) -> int:
    """Return what some tokens take for a while: hidden states, experts' inputs, attention scores."""
    widest = max(max(shape) for layer in index.layers for shape in layer.shapes.values())
    top = getattr(config, "num_experts_per_tok", 1) or 1
    hidden = tokens * (20 * config.hidden_size + 3 * widest * top) * max(4, dtype.itemsize)
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    return hidden + 2 * tokens * context * heads * dtype.itemsize


def _matrices(index: Index, config: Any, dtype: torch.dtype) -> int:
    """Return what is taken for a while whatever the tokens: an expert's matrix in full, logits, kernels.

    The head counts once more: oneDNN lays it out anew for a product of half precision.
    """
    expert = 16 * max(s[0] * s[1] for layer in index.layers for s in layer.shapes.values())
    again = config.vocab_size * config.hidden_size * dtype.itemsize if dtype.itemsize < 4 else 0
    return expert + again + 16 * config.vocab_size


def share_kept(index: Index, budget: Budget) -> float:
    """Return the share of the experts' bytes that there is room for; 1: all stay in memory."""
    return min(1.0, (budget.experts - budget.staging) / sum(size_of(m) for _, _, m in index.blobs()))


def explain(path: Path | str, budget: Budget) -> str:
    """Return every term in words, and in which way the engine will run."""
    index = read_index(path)
    every = sum(size_of(m) for _, _, m in index.blobs())
    kept = share_kept(index, budget)
    terms = {
        "hot weights": budget.hot,
        f"keys and values, {budget.batch} x {budget.context} tokens": budget.kv,
        f"workspace, {budget.chunk} tokens at a time": budget.workspace,
        "index and tables": budget.index,
        "experts being read": budget.staging,
        f"experts kept, {kept:.0%} of {every / 1e6:.1f} MB": budget.experts - budget.staging,
        "in all": budget.total,
    }
    lines = [f"  {what:<44} {size / 1e6:>10.2f} MB" for what, size in terms.items()]
    how = "all experts stay in memory" if kept == 1 else "experts are read when a router asks for them"
    return "\n".join([*lines, f"  {how}; the process holds {resident_bytes() / 1e6:.0f} MB besides"])
