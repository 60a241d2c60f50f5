"""All of a model but its routed experts: whether a store can be opened from it, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError, DataError
from poise.files import write_shards
from poise.walk import Weight, weights
from poise_edgemoe.models import empty_model, in_full
from poise_edgemoe.store.index import HOT
from poise_edgemoe.store.schemes import stored, written
from poise_edgemoe.store.source import BIAS, Source

SHARD = 1 << 28  # bytes of a file of hot weights
Read = Callable[[], Tensor]


def hot_reads(source: Source, dtype: torch.dtype) -> dict[str, Read]:
    """Return what reads each hot tensor, of those that the configuration ties only the first.

    What is made from the configuration alone must find in the store all that it needs, and nothing else:
    a store that nobody can open is refused before it is written.

    Raises
    ------
    ConfigError
        For a weight that the configuration's model does not have, or has and the source lacks; for two
        that it ties, and that differ.
    """
    model, reads = empty_model(source.config, dtype), source.rest()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key, first in tied.items():
        if key in reads:
            read = reads.pop(key)
            if not _same(read(), reads.setdefault(first, read)()):
                raise ConfigError(f"the configuration ties {key} with {first}, and the model's differ: set "
                                  f"config.tie_word_embeddings = False")
    experts = tuple(f"{layer.path}." for layer in source.layers)
    own = {k for k in model.state_dict()
           if k not in tied and (BIAS.fullmatch(k) or not k.startswith(experts))}
    if odd := sorted(own ^ reads.keys()):
        what = "is missing" if odd[0] in own else f"is none of {type(model).__name__}"
        raise ConfigError(f"{odd[0]} {what}: a store is opened as the configuration says")
    return {key: read for key, read in reads.items() if not BIAS.fullmatch(key)}


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are one, or equal."""
    return (a.data_ptr() == b.data_ptr() and a.shape == b.shape) or torch.equal(a, b)


def write_hot(
    source: Source, reads: dict[str, Read], folder: Path, dtype: torch.dtype, hot: Any
) -> dict[str, Any]:
    """Write hot weights as safetensors; return what the index says of those that are packed.

    One quantizer packs all of them: where fp16 does not hold a scale, all scales are kept in fp32.
    """
    quantizer = None if isinstance(hot, str) else hot
    packed = _packable(source, dtype) if quantizer is not None else {}
    tensors = _hot_tensors(reads, in_full(source.config), dtype, packed, quantizer)
    try:
        write_shards(tensors, folder, stem=HOT, shard_bytes=SHARD)  # two copies of a shard are in memory
    except _NeedsWider as found:
        return write_hot(source, reads, folder, dtype, found.quantizer)
    return {"quantizer": written(quantizer), "packed": sorted(packed.values())} if packed else {}


class _NeedsWider(Exception):
    """A matrix has scales that only this quantizer keeps."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer


def _packable(source: Source, dtype: torch.dtype) -> dict[str, str]:
    """Return the hot matrices that packed layers can stand in for, key to name: linears, and tables of
    tokens, which may be tied with the output layer."""
    model = empty_model(source.config, dtype)
    table = model.get_input_embeddings().weight.shape
    return {w.state_key: w.name for w in weights(model)
            if (w.role == "linear" and w.replaceable and not w.tied_layers)
            or (w.role == "embedding" and w.shape == table
                and {type(m) for m in layers_of(model, w)} <= {nn.Embedding, nn.Linear})}


def layers_of(model: nn.Module, weight: Weight) -> list[nn.Module]:
    """Return the layers that use a matrix, under all of its names."""
    return [model.get_submodule(name) for name in (weight.name, *weight.tied_with)]


def _hot_tensors(
    reads: dict[str, Read], full: Callable[[str], bool], dtype: torch.dtype, packed: dict[str, str],
    quantizer: Any,
) -> Iterator[tuple[str, Tensor]]:
    for key, read in reads.items():
        tensor = read()
        if tensor.is_floating_point():
            tensor = finite(tensor if full(key) else tensor.to(dtype), key)
        if key in packed:
            try:
                used, made = stored(quantizer, tensor)
            except DataError as error:
                raise DataError(f"weight {key} {error}") from None
            if used is not quantizer:
                raise _NeedsWider(used)
            for name, part in made.tensors().items():
                yield f"{packed[key]}.packed.{name}", part
        else:
            yield key, tensor.contiguous()


def finite(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor, as it will be written; NaN and Inf are refused."""
    if not tensor.isfinite().all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise DataError(f"weight {name} holds NaN or Inf (as {kind}): a store holds finite numbers")
    return tensor
