"""What a memory limit is spent on, computed before anything is loaded (EdgeMoE section III-A; ours)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from poise.errors import ConfigError
from poise.models.serving import context_of
from poise_edgemoe.cache.allowance import check_share
from poise_edgemoe.cache.planes import aside
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.loading import HEAD_ROWS, hot_files, prepare, read_config
from poise_edgemoe.models import model_class
from poise_edgemoe.store.index import Index, read_index

MOST_CHUNK, LEAST_CHUNK = 512, 8  # tokens of a prompt that are computed at a time
KEPT = 16 << 20  # most that MKL, oneDNN and the allocator keep for themselves; less for small models
LIBRARIES = 8 << 20  # of their code that is read in when it first runs, with `total`
LEAST_KEPT = {2: 8 << 20, 4: 0}  # by bytes of a number: oneDNN's kernels are not small
# bytes of an attention score, its place in a mask, its relative position, all intermediate ones included
EAGER, MASK, RELATIVE = 16, 8, 80


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
        What is computed with: one expert's matrices in full, activations of `tokens` tokens.
    index : int
        The index of the store, the policy's tables, a predictor.
    staging : int
        Experts that are read without being kept, and room to put planes together.
    experts : int
        Experts in memory, `staging` included.
    chunk : int
        Tokens of a prompt, of each row, that are computed at a time. What they take beyond the workspace is
        lent by experts while the prompt runs.
    tokens : int
        Of all rows, that the workspace holds.
    token_bytes : int
        Activations of one.
    logits_bytes : int
        Of one token: those of a prompt in pieces, `logits` excepted, are never there at once.
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
    tokens: int
    token_bytes: int
    logits_bytes: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.hot + self.kv + self.workspace + self.index + self.experts

    def lent(self, tokens: int) -> int:
        """Return the bytes that experts lend to that many tokens."""
        return max(0, tokens - self.tokens) * self.token_bytes

    def piece(self, rows: int) -> int:
        """Return of how many tokens of each row logits are computed at a time; experts lend them room."""
        n, room = self.chunk, self.experts - self.staging
        while n > LEAST_CHUNK and self.lent(n * rows) + n * rows * self.logits_bytes > room:
            n = max(LEAST_CHUNK, n // 2)
        return n

    def terms(self) -> dict[str, int]:
        """Return every term in bytes, and the sum."""
        return {**asdict(self), "total": self.total}


def parse_bytes(said: str | int) -> int:
    """Return the bytes of "900MB", "4 GB", "1.5GiB" or a number."""
    hit = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmg])(i?)b?|b)?\s*", str(said), re.IGNORECASE)
    if hit is None or isinstance(said, bool) or ("." in hit[1] and not hit[2]):
        raise ConfigError(f"{said!r} is no number of bytes: write 900MB, 4GB or 1.5GiB")
    power = " kmg".index((hit[2] or " ").lower())
    return int(float(hit[1]) * (1024 if hit[3] else 1000) ** power)


def plan_memory(
    path: Path | str, *, memory: str | int | None = None, total: str | int | None = None,
    context: int | None = None, batch: int = 1, learned: int = 0, base_share: float = 0.0,
) -> Budget:
    """Return how a limit is shared out; see `Engine.open`. `learned`: bytes of a predictor.

    Raises
    ------
    ConfigError
        When the limit is too small, with the smallest workable value.
    """
    # libraries set themselves up before what the process holds is counted
    index = read_index(path) if total is None else prepare(Path(path))
    config = read_config(Path(path))
    context = _context(context, config)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch={batch!r} is not allowed: it must be a whole number >= 1")
    if memory is not None and total is not None:
        raise ConfigError("memory and total are both given: give one of them")
    least = _least(index, config, Path(path), context, batch, check_share(base_share, index.planes))
    least = replace(least, index=least.index + learned)
    every = sum(size_of(m) for _, _, m in index.blobs())
    whole = max(0, min(context, MOST_CHUNK) * batch - least.tokens) * least.token_bytes
    given = memory is not None or total is not None
    limit = _limit(memory, total) if given else least.total + every + whole
    largest = max(size_of(m) for _, _, m in index.blobs())
    if limit < least.total + largest or (total is not None and parse_bytes(total) < status_bytes("VmHWM")):
        _refuse(least, largest, memory, total)
    kept = min(limit - least.total, every)
    spare = min(limit - least.total - kept, whole) // least.token_bytes
    least = replace(least, workspace=least.workspace + spare * least.token_bytes,
                    tokens=least.tokens + spare)
    chunk = least.chunk if config.is_encoder_decoder else min(context, MOST_CHUNK)
    while chunk > least.chunk and least.lent(chunk * batch) > kept:
        chunk = max(least.chunk, chunk // 2)
    return replace(least, experts=least.experts + kept, chunk=chunk)


def _refuse(least: Budget, largest: int, memory: str | int | None, total: str | int | None) -> None:
    given = f"memory={memory}" if total is None else f"total={total}"
    smallest, besides = least.total + largest, ""
    if total is not None:  # a process that has held more than `total` cannot stay below it
        held = status_bytes("VmHWM")
        smallest = max(smallest + resident_bytes() + LIBRARIES, held)
        besides = f"the process has held {held / 1e6:.1f} already; "
    raise ConfigError(f"{given} is too small: the smallest workable value is "
                      f"{-(-smallest // 10**6)}MB ({besides}hot weights {least.hot / 1e6:.1f}, "
                      f"keys and values {least.kv / 1e6:.1f}, workspace {least.workspace / 1e6:.1f}, index "
                      f"{least.index / 1e6:.1f}, one expert {largest / 1e6:.1f}, those being "
                      f"read {least.staging / 1e6:.1f})")


def _limit(memory: str | int | None, total: str | int | None) -> int:
    if total is None:
        assert memory is not None
        return parse_bytes(memory)
    return parse_bytes(total) - resident_bytes() - LIBRARIES


def resident_bytes() -> int:
    """Return what the process holds now."""
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """Return what the system says of this process: VmRSS, VmHWM (its peak), RssFile (of files: code)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _context(context: int | None, config: Any) -> int:
    most = context_of(config)
    if context is None:
        return most
    given = getattr(config, "max_position_embeddings", None) or context
    if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= given:
        raise ConfigError(f"context={context!r} is not allowed: it must lie between 1 and {given} tokens")
    return context


def _least(
    index: Index, config: Any, folder: Path, context: int, batch: int, base_share: float
) -> Budget:
    """Return all terms but experts that are kept, for prompts in the smallest pieces."""
    dtype = getattr(torch, index.dtype)
    staging = aside(index, base_share)
    hot = sum(p.stat().st_size for p in hot_files(folder, index))
    kv = kv_bytes(config, dtype) * context * batch
    tables = 2048 * sum(len(layer.experts) for layer in index.layers)
    chunk = context if config.is_encoder_decoder else min(context, LEAST_CHUNK)  # an encoder sees all of it
    each = _activations(index, config, dtype, context)
    kept = max(min(KEPT, 2 * hot), LEAST_KEPT[dtype.itemsize])
    logits = (16 + LEAST_CHUNK * dtype.itemsize) * config.vocab_size * batch
    workspace = (_matrices(index, config, dtype) + logits + _keys_again(config, kv) + kept
                 + chunk * batch * each)
    return Budget(hot, kv, workspace, tables, staging, staging, context, batch, chunk, chunk * batch, each,
                  config.vocab_size * dtype.itemsize)


def _keys_again(config: Any, kv: int) -> int:
    """Return what a layer's keys and values take once more, where they are laid out anew for attention."""
    if config.is_encoder_decoder:
        return 4 * kv // config.num_decoder_layers
    heads = config.num_attention_heads
    times = heads // (getattr(config, "num_key_value_heads", None) or heads)
    # a window that slides is laid out for every token
    slides = bool(getattr(config, "sliding_window", None))
    return (times + 2 * slides + (times > 1)) * kv // config.num_hidden_layers


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


def _activations(index: Index, config: Any, dtype: torch.dtype, context: int) -> int:
    """Return what a token takes for a while: hidden states, experts' inputs, attention scores or a mask."""
    widest = max(max(shape) for layer in index.layers for shape in layer.shapes.values())
    top = getattr(config, "num_experts_per_tok", 1) or 1
    hidden = (20 * config.hidden_size + 3 * widest * top) * max(4, dtype.itemsize)
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    if config.is_encoder_decoder:  # relative positions are tables of int64, of all tokens by all tokens
        return hidden + context * (EAGER * heads + RELATIVE)
    return hidden + context * (EAGER * heads if _in_full(config) else MASK)


def _in_full(config: Any) -> bool:
    """Return whether transformers computes all attention scores of a family at once."""
    return not model_class(config)._supports_sdpa


def _matrices(index: Index, config: Any, dtype: torch.dtype) -> int:
    """Return what is taken for a while whatever the tokens: an expert's matrix in full.

    A part of the head counts once more: oneDNN may lay it out anew for a product of half precision.
    """
    raw = all(form["entry"] == "raw" for form in index.quantizers)  # those are multiplied as they lie
    expert = (4 if raw else 16) * max(s[0] * s[1] for layer in index.layers for s in layer.shapes.values())
    rows = min(config.vocab_size, HEAD_ROWS) if dtype.itemsize < 4 else 0
    again = rows * config.hidden_size * dtype.itemsize
    return expert + again


def share_kept(index: Index, budget: Budget) -> float:
    """Return the share of the experts' bytes that there is room for; 1: all stay in memory."""
    return min(1.0, (budget.experts - budget.staging) / sum(size_of(m) for _, _, m in index.blobs()))


def percent(share: float) -> str:
    """Return a share in whole percent; 100 % is all of it."""
    return f"{100 if share == 1 else min(99, round(100 * share))}%"


def explain(path: Path | str, budget: Budget) -> str:
    """Return every term in words, and in which way the engine will run."""
    index = read_index(path)
    every = sum(size_of(m) for _, _, m in index.blobs())
    kept = share_kept(index, budget)
    shown = percent(kept)
    terms = {
        "hot weights": budget.hot,
        f"keys and values, {budget.batch} x {budget.context} tokens": budget.kv,
        f"workspace, {budget.tokens} tokens": budget.workspace,
        "index and tables": budget.index,
        "experts being read": budget.staging,
        f"experts kept, {shown} of {every / 1e6:.1f} MB": budget.experts - budget.staging,
        "in all": budget.total,
    }
    lines = [f"  {what:<44} {size / 1e6:>10.2f} MB" for what, size in terms.items()]
    how = "all experts stay in memory" if kept == 1 else "experts are read when a router asks for them"
    lent = budget.lent(budget.chunk * budget.batch)
    more = f", which experts lend {lent / 1e6:.2f} MB meanwhile" if lent else ""
    return "\n".join([*lines, f"  {how}; the process holds {resident_bytes() / 1e6:.0f} MB besides",
                      f"  a prompt is computed {budget.chunk} tokens at a time{more}"])
