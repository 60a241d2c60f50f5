"""Stores of any size with random weights, written as stores: no checkpoint of sixty gigabytes lies between.

Speed, memory and reads depend on shapes and on routing, not on what weights say. A few experts are drawn
and quantized, and written again and again; routing is to be replayed (`poise_edgemoe.replay`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError
from poise.files import make_folder, sync_folder, write_json
from poise.registry import build
from poise.walk import FAMILIES
from poise.walk.families import holds_experts
from poise_edgemoe.cache.traces import RoutingTrace, tokens_of
from poise_edgemoe.loading import expert_shapes
from poise_edgemoe.models import empty_model, in_full
from poise_edgemoe.store.blobs import bytes_of_tensors
from poise_edgemoe.store.checksums import crc32
from poise_edgemoe.store.hot import write_hot
from poise_edgemoe.store.index import CONFIG, EXPERTS, LOW, PAGE, Layer, Matrix, padded
from poise_edgemoe.store.planes import Planed, in_planes
from poise_edgemoe.store.schemes import scheme_quantizer, written
from poise_edgemoe.store.source import BIAS, Source
from poise_edgemoe.store.writer import finish
from poise_edgemoe.synthetic import removed_on_failure

DTYPE, SPREAD = torch.bfloat16, 0.02
Blob = tuple[bytes, int]  # a matrix, or a plane of one, as it lies in a store, and its checksum


def write_drawn_store(
    path: Path | str, config: Any, *, bits: int = 4, group: int = 64, hot: int = 4, distinct: int = 4,
    seed: int = 0, scheme: str = "asym_group", plan: Mapping[str, int] | None = None, planes: int = 1,
) -> Path:
    """Write the store of a configuration with random weights, layer by layer.

    Parameters
    ----------
    path : path
        The folder to make; it must not exist, and is not there before it is whole.
    config : transformers' configuration
        Of a served decoder.
    bits, group : int
        Of experts; 16: bfloat16.
    hot : int
        Bits of all else but norms and routers: 4 or 8.
    distinct : int
        How many experts are drawn, at each number of bits; the others are the same again.
    scheme : str
        As `convert` has it.
    plan : mapping, optional
        Name of an expert's matrix to bits, in place of `bits`: that of another model of as many layers and
        experts, whose proportions are kept.
    planes : 1 or 2
        As `convert` has it.

    Raises
    ------
    ConfigError
        For a path that exists, a configuration without experts, or a plan of other experts.
    FileError
        When it cannot be written; nothing is left of it.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    for taken in (path, partial):
        if os.path.lexists(taken):
            raise ConfigError(f"{taken} exists: remove it first, or name another store")
    model = empty_model(config, DTYPE)
    blocks = {name: module for name, module in model.named_modules() if holds_experts(name)}
    if not blocks:
        raise ConfigError(f"{type(config).__name__} has no routed experts: a store is for those")
    try:
        make_folder(path.parent)
        partial.mkdir()
        with removed_on_failure(partial):
            widths = _widths(config, blocks, bits, plan)
            forms: dict[int, Any] = {b: scheme_quantizer(scheme, b, group)
                                     for b in sorted(set(widths.values()))}
            if planes == 2:
                forms = {b: in_planes(q, "an expert", (16, 64)) for b, q in forms.items()}
            _write(partial, config, model, blocks, widths, forms, hot, distinct,
                   torch.Generator().manual_seed(seed))
            os.rename(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"cannot write {partial}: {error.strerror or error}") from error
    return path


def _widths(
    config: Any, blocks: dict[str, Any], bits: int, plan: Mapping[str, int] | None
) -> dict[str, int]:
    """Return bits by name of a matrix."""
    transposed = FAMILIES[config.model_type].transposed
    names = [f"{path}.{e}.{part}" for path, module in blocks.items()
             for shapes, _, experts in [expert_shapes(module, transposed)]
             for e in range(experts) for part in shapes]
    if plan is None:
        return dict.fromkeys(names, bits)
    if odd := sorted(set(names) ^ plan.keys()):
        where = "the model lacks" if odd[0] in plan else "the plan does not name"
        raise ConfigError(f"the plan is of other experts: {where} {odd[0]}; give one of a model with as "
                          f"many layers and experts")
    return {name: plan[name] for name in names}


def _write(
    folder: Path, config: Any, model: Any, blocks: dict[str, Any], widths: dict[str, int],
    forms: dict[int, Any], hot: int, distinct: int, draw: torch.Generator,
) -> None:
    layers = _write_experts(folder, config, blocks, widths, forms, distinct, draw)
    packed = write_hot(Source(config, [], lambda: iter(())), _reads(model, config, draw), folder, DTYPE,
                       build("quantizer", "affine", bits=hot, group=64))
    write_json(folder / CONFIG, config.to_dict())
    finish(folder, config.model_type, DTYPE, [written(q) for q in forms.values()], layers, packed)


def _write_experts(
    folder: Path, config: Any, blocks: dict[str, Any], widths: dict[str, int], forms: dict[int, Any],
    distinct: int, draw: torch.Generator,
) -> list[Layer]:
    places = {b: n for n, b in enumerate(forms)}
    transposed = FAMILIES[config.model_type].transposed
    layers: list[Layer] = []
    known: dict[Any, list[list[Blob]]] = {}
    with open(folder / EXPERTS, "wb") as f:
        for path, module in blocks.items():
            shapes, biased, experts = expert_shapes(module, transposed)
            turns = count(len(layers))
            where = []
            for e in range(experts):
                turn, parts = next(turns) % distinct, {}
                for part, shape in shapes.items():
                    width = widths[f"{path}.{e}.{part}"]
                    blobs = known.setdefault((part, tuple(shape), width), [])
                    if len(blobs) <= turn:
                        form = forms[width]
                        blobs += [_blobs(form, shape, part in biased, draw) for _ in range(distinct)]
                    parts |= zip((part, part + LOW), ((places[width], *blob) for blob in blobs[turn]))
                where.append({name: _put(f, *parts[name]) for name in sorted(parts, key=_is_low)})
            layers.append(Layer(path, False, shapes, biased, transposed, where))
        f.flush()
        os.fsync(f.fileno())
    return layers


def _is_low(name: str) -> bool:
    """Return whether it is a second plane: those come after all bases."""
    return name.endswith(LOW)


def _put(f: BinaryIO, form: int, data: bytes, crc: int) -> Matrix:
    offset = f.tell()
    f.write(data)
    f.write(bytes(padded(len(data), PAGE) - len(data)))
    return Matrix(offset, len(data), form, crc)


def _blobs(quantizer: Any, shape: list[int], biased: bool, draw: torch.Generator) -> list[Blob]:
    """Return a matrix as it lies in a store, each plane by itself."""
    weight = torch.empty(*shape).normal_(0, SPREAD, generator=draw).to(DTYPE)
    bias = torch.zeros(shape[0], dtype=DTYPE) if biased else None
    if isinstance(quantizer, Planed):
        high, low = quantizer.split(quantizer.quantizer.quantize(weight))
        found = [bytes(bytes_of_tensors(high, bias)), bytes(bytes_of_tensors(low, None))]
    else:
        found = [bytes(bytes_of_tensors(quantizer.quantize(weight).tensors(), bias))]
    return [(data, crc32(data)) for data in found]


def _reads(model: Any, config: Any, draw: torch.Generator) -> dict[str, Any]:
    """Return what draws each hot tensor, those that are tied but once."""
    tied, full = getattr(model, "all_tied_weights_keys", None) or {}, in_full(config)

    def read(name: str, like: Tensor) -> Tensor:
        dtype = torch.float32 if full(name) else DTYPE
        if like.ndim < 2:
            return torch.full(like.shape, 1.0 if name.endswith("norm.weight") else 0.0, dtype=dtype)
        spread = 1.0 if "embed" in name else SPREAD
        return torch.empty(like.shape).normal_(0, spread, generator=draw).to(dtype)

    own = {k: v for k, v in model.state_dict().items()
           if k not in tied and not BIAS.fullmatch(k) and ".experts." not in k}
    return {name: (lambda name=name, like=like: read(name, like)) for name, like in own.items()}


def reuse(trace: RoutingTrace) -> float:
    """Return the share of a decoded token's experts that the token before it used in the same layer."""
    tokens = tokens_of(trace.decode, trace.layers)
    pairs = [(set(a), set(b)) for one, two in pairwise(tokens) for a, b in zip(one, two)]
    return sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)


def drawn_trace(
    layers: int, experts: int, top: int, tokens: int, share: float, *, seed: int = 0
) -> RoutingTrace:
    """Draw routing in which a token uses that share of the last one's experts again, and any others.

    The prompt uses all experts.
    """
    if not 0 <= share <= 1 or not 1 <= top <= experts:
        raise ConfigError(f"share={share!r}, top={top!r} are not allowed: 0 to 1, and 1 to {experts}")
    draw = torch.Generator().manual_seed(seed)
    last = [torch.randperm(experts, generator=draw)[:top].tolist() for _ in range(layers)]
    uses = []
    for _ in range(tokens):
        for n in range(layers):
            kept = [e for e in last[n] if torch.rand((), generator=draw) < share]
            others = [e for e in torch.randperm(experts, generator=draw).tolist() if e not in last[n]]
            spare = [e for e in last[n] if e not in kept]
            last[n] = sorted((kept + others + spare)[:top])
            uses += [(n, e) for e in last[n]]
    prompt = tuple((n, e) for n in range(layers) for e in range(experts))
    return RoutingTrace(layers, experts, (1,) * layers, prompt, tuple(uses))
