"""What tells one model's numbers from another's: a hash of its configuration and its tensors' checksums.

A directory, the live model and a store of 16 or 32 bits made of it have one identity, since it is of
numbers, not of files. Every byte is read once, at the speed of a CRC-32.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError
from poise_edgemoe.loading import hot_files, read_config, read_tensors
from poise_edgemoe.models import in_full
from poise_edgemoe.store.checksums import crc32
from poise_edgemoe.store.hot import hot_reads
from poise_edgemoe.store.index import Index
from poise_edgemoe.store.source import Source
from poise_edgemoe.widths.raw_experts import RawExperts

VOLATILE = ("name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
            "output_router_logits", "output_attentions", "output_hidden_states", "return_dict")
Progress = Callable[[int, int], None]


def identity_of(source: Source, progress: Progress | None = None) -> str:
    """Return the identity of a model that is read tensor by tensor.

    Parameters
    ----------
    progress : callable, optional
        Called with layers that were read, from 0 on, and all.
    """
    facts, biases = [], source.biases()
    dtype = next(iter(source.layers[0].experts[0].values())).dtype
    tell = progress or _untold
    tell(0, len(source.layers))
    for n, layer in enumerate(source.layers):
        facts += [_fact(w.name, w.read()) for one in layer.experts for w in one.values()]
        own = biases.get(layer.path, {})
        facts += [_fact(f"{layer.path}.{e}.{part}_bias", own[part][e].to(dtype))
                  for part in own for e in range(len(layer.experts))]
        tell(n + 1, len(source.layers))
    full = in_full(source.config)
    for key, read in hot_reads(source, dtype).items():
        tensor = read()
        cast = tensor.is_floating_point() and not full(key)
        facts.append(_fact(key, tensor.to(dtype) if cast else tensor))
    return _hashed(source.config, facts)


def identity_of_store(folder: Path, index: Index, progress: Progress | None = None) -> str:
    """Return the identity of a store whose numbers are not quantized.

    Raises
    ------
    ConfigError
        For a store that is quantized: what it was made from cannot be told.
    """
    check_raw(folder, index)
    facts = list(_expert_facts(folder, index, progress or _untold))
    for path in hot_files(folder, index):
        facts += [_fact(key, tensor) for key, tensor in read_tensors(path, index).items()]
    return _hashed(read_config(folder), facts)


def check_raw(folder: Path, index: Index) -> None:
    """Refuse a store that is quantized.

    Raises
    ------
    ConfigError
    """
    if index.hot or any(form["entry"] != "raw" for form in index.quantizers):
        raise ConfigError(f"{folder} holds quantized weights: widths are measured on a model as trained; "
                          f"give its directory, or a store made with bits=16 or 32 and without hot=8 or 4")


def _expert_facts(folder: Path, index: Index, tell: Progress) -> Iterator[list[Any]]:
    experts = RawExperts(folder, index)
    tell(0, len(index.layers))
    for n, layer in enumerate(index.layers):
        for e in range(len(layer.experts)):
            for part, (weight, bias) in experts.read((n, e)).items():
                yield _fact(f"{layer.path}.{e}.{part}", weight)
                if bias is not None:
                    yield _fact(f"{layer.path}.{e}.{part}_bias", bias)
        tell(n + 1, len(index.layers))


def _untold(done: int, of: int) -> None:
    """Tell nobody."""


def _fact(name: str, tensor: Tensor) -> list[Any]:
    """Return what is kept of a tensor; two sums, since one of 32 bits alone may be met by chance."""
    data: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return [name, str(tensor.dtype), list(tensor.shape), crc32(data), zlib.adler32(data)]


def _hashed(config: Any, facts: list[list[Any]]) -> str:
    said = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in VOLATILE}
    text = json.dumps([said, sorted(facts)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
