"""Conversion: one layer's experts in memory at a time, resumable, whole or not there.

What is made lies in `NAME.partial` until it is complete. `progress.jsonl` there says after each layer what
was written; a conversion that was killed goes on after the last line of it, and ends with the same bytes.
Whoever converts holds the lock `NAME.lock`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from poise.errors import ConfigError, FileError
from poise.files import checksum, make_folder, sync_folder, write_json
from poise.interfaces import Quantizer
from poise.quantizers.whole import resolve
from poise.registry import build
from poise.walk import Weight
from poise_edgemoe.store.hot import Read, hot_reads, write_hot
from poise_edgemoe.store.index import (
    CONFIG,
    DTYPES,
    EXPERTS,
    HOT,
    INDEX,
    VERSION,
    Index,
    Layer,
    padded,
    read_layer,
    write_index,
)
from poise_edgemoe.store.layouts import LAYOUTS, check_layout
from poise_edgemoe.store.planes import in_planes
from poise_edgemoe.store.schemes import BLOCKS, HOTS, RAW, Raw, bits_of, scheme_quantizer, written
from poise_edgemoe.store.source import Source, open_source
from poise_edgemoe.store.writing import write_layer

BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
          "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
          "poise_tokenizer.json")
JOURNAL = "progress.jsonl"
Progress = Callable[[int, int], None]


def convert(
    model: Any, path: Path | str, bits: int | None = None, plan: Mapping[str, Any] | None = None,
    scheme: str = "asym_group", group: int = 64, hot: Any = "bf16",
    progress: Progress | None = None, layout: str = "auto", planes: int = 1,
) -> Path:
    """Write a mixture-of-experts model as a store.

    Parameters
    ----------
    model : path or nn.Module
        A transformers directory, read tensor by tensor, or a live transformers model.
    path : path
        The folder to make; it must not exist.
    bits : int, optional
        Of experts: 2, 3, 4, 8; 16: bfloat16 (float16 for a model that is), 32: float32. Without: 4, or the
        only ones of a format of ggml.
    plan : mapping, optional
        Name or pattern of an expert's matrix to bits or a quantizer, as `quantize_model` takes it; what it
        does not name is stored at `bits`. One that `allocate` made is refused for another model.
    scheme : str
        sym_channel, asym_channel, sym_group, asym_group, or a registered quantizer; q8_0, q4_0, q4_k, q3_k
        and q2_k are ggml's blocks, the bytes of a GGUF file.
    group : int
        Columns that share a scale, in the schemes with groups.
    hot : "bf16", "raw", 8, 4, one of ggml's formats, or a registered quantizer
        How the rest is stored, and what is computed in: "bf16", 16 bits (float16 for a model that is);
        "raw", the model's own type; 8, 4 bits or a format for its linears and its table of tokens, all else
        as with "bf16". With `bits=32` "bf16" means "raw": who keeps experts exact wants the rest so too.
    progress : callable, optional
        Called with layers that are written, from 0 on, and all.
    layout : "auto", "plain", "ggml" or "torch"
        In which order bytes of packed experts lie, which changes no value (`layouts.lay_out`): "ggml"
        interleaves rows of q4_0; "torch" packs 4 bits in groups as torch does for this processor, and only
        its like can open the store.
    planes : 1 or 2
        2: each matrix of 4 or 8 bits in groups or channels lies in two halves, a base of 2 or 4 bits and
        what refines it to exactly the ordinary store's, so that an engine may use the base at once
        (`Engine.open(base_share=...)`). Decoders only, plain layout.

    Returns
    -------
    Path
        The store.

    Raises
    ------
    ConfigError
        For a model without experts, an unknown family, a path that exists, an option out of range, a type
        that a store does not compute in; a live model that could not be opened again from its tensors: on
        the meta device, with experts that share a matrix, or with weights that its class does not have.
    DataError
        Naming a weight that holds NaN or Inf.
    FileError
        For a source that is torn, a disk that is full (the next call goes on), or another process that is
        converting to the same place.
    """
    path, bits = Path(path), bits_of(scheme, bits)
    hot = "raw" if bits == 32 and hot == "bf16" else _hot_form(hot)
    _refuse_taken(path)
    planed, source = _two_planes(planes), open_source(model)
    if (bound := getattr(plan, "for_source", None)) is not None:  # it knows which model it was made for
        plan = bound(source, scheme, group)
    forms, dtype = _forms(source, bits, plan, scheme, group), _dtype(source, hot)
    _check_layout(source, forms, layout)
    if planed:
        forms = _in_planes(source, forms, layout)
    partial = path.with_name(f"{path.name}.partial")
    with _full_disk(partial):
        make_folder(path.parent)
        with _alone(path):
            _refuse_taken(path)  # another conversion may have ended since
            reads = hot_reads(source, dtype)
            make_folder(partial)
            _convert(source, partial, forms, reads, hot, dtype, progress or _untold, layout)
            (partial / JOURNAL).unlink()
            os.rename(partial, path)
            sync_folder(path.parent)
    return path


def _untold(done: int, of: int) -> None:
    """Tell nobody how far a conversion is."""


def _refuse_taken(path: Path) -> None:
    if os.path.lexists(path):  # a link that leads nowhere is in the way too
        raise ConfigError(f"{path} exists: remove it first, or name another store")


def _hot_form(hot: Any) -> Any:
    """Return "bf16", "raw" or the quantizer of hot matrices, or refuse it."""
    if isinstance(hot, Quantizer):
        written(hot)  # the index must be able to name it
        return hot
    if hot in (8, 4) and type(hot) is int:
        return build("quantizer", "affine", bits=hot, group=64)
    if isinstance(hot, str) and hot in BLOCKS:
        return build("quantizer", hot)
    if hot not in ("bf16", "raw"):
        raise ConfigError(f"hot={hot!r} is not allowed: it must be one of {', '.join(HOTS)} or a quantizer")
    return hot


@contextmanager
def _full_disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        more = ": free some room and convert again, which goes on where this ended" if full else ""
        raise FileError(f"cannot write {partial}: {error.strerror or error}{more}") from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock beside a store: two conversions would write over each other.

    Its file is removed while it is held, so whoever gets hold of one that is gone tries again. One that a
    killed conversion has left is held by nobody.
    """
    lock = path.with_name(f"{path.name}.lock")
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                break
        except BlockingIOError:
            os.close(handle)
            raise FileError(f"{path} is being written by another conversion: wait for it") from None
        os.close(handle)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _forms(
    source: Source, bits: int, plan: Mapping[str, Any] | None, scheme: str, group: int
) -> dict[str, Any]:
    """Return what stores each expert's matrix, by name."""
    found = [w for layer in source.layers for one in layer.experts for w in one.values()]
    forms = dict.fromkeys((w.name for w in found), _quantizer(scheme, bits, group, found[0]))
    if plan is not None:
        if not isinstance(plan, Mapping):
            raise ConfigError(f"a plan is a mapping of names or patterns to bits, not "
                              f"{type(plan).__name__}")
        for width in (v for v in plan.values() if isinstance(v, int)):
            scheme_quantizer(scheme, width, group)
        known = {b: _quantizer(scheme, b, group, found[0]) for b in RAW}
        default = scheme_quantizer(scheme, bits_of(scheme, None) if bits in RAW else bits, group)
        own = {k: known.get(v, v) if isinstance(v, int) else v for k, v in plan.items()}
        forms |= {w.name: q for w, q in resolve(found, default, own)}
    for q in {id(q): q for q in forms.values()}.values():
        written(q)
    return forms


def _check_layout(source: Source, forms: dict[str, Any], layout: str) -> None:
    """Refuse a layout that some matrix cannot have, before anything is written."""
    seen = set()
    for layer in source.layers:
        for w in (w for one in layer.experts for w in one.values()):
            if (kind := (id(forms[w.name]), tuple(w.shape))) not in seen:
                seen.add(kind)
                try:
                    check_layout(layout, getattr(forms[w.name], "plain", forms[w.name]), w.shape, w.dtype)
                except ConfigError as error:
                    raise ConfigError(f"{w.name}: {error}" if layout in LAYOUTS else str(error)) from None


def _two_planes(planes: Any) -> bool:
    if type(planes) is not int or planes not in (1, 2):
        raise ConfigError(f"planes={planes!r} is not allowed: it must be 1, or 2: a base, and the rest")
    return planes == 2


def _in_planes(source: Source, forms: dict[str, Any], layout: str) -> dict[str, Any]:
    """Return what stores each matrix in two planes; refuse what has none before anything is written."""
    if source.config.is_encoder_decoder:
        raise ConfigError(f"planes=2 does not fit {source.family}, an encoder-decoder: leave it out")
    if layout not in ("auto", "plain"):
        raise ConfigError(f"planes=2 does not fit layout={layout}: take plain, or leave planes out")
    found = {w.name: w for layer in source.layers for one in layer.experts for w in one.values()}
    return {name: in_planes(q, name, found[name].shape) for name, q in forms.items()}


def unnamed(model: Any, plan: Mapping[str, Any]) -> list[str]:
    """Return the experts' matrices that a plan does not name; what it names may be of any bits."""
    found = [w for layer in open_source(model).layers for one in layer.experts for w in one.values()]
    default = scheme_quantizer("asym_group", 4, 64)
    named = {w.name for w, _ in resolve(found, default, dict.fromkeys(plan, 4))}
    return [w.name for w in found if w.name not in named]


def _quantizer(scheme: str, bits: int, group: int, like: Weight) -> Any:
    if bits == 16 and like.dtype == torch.float16:
        return Raw("float16")
    return scheme_quantizer(scheme, bits, group)


# ------------------------------------------------------------------ the folder


def _convert(
    source: Source, folder: Path, forms: dict[str, Any], reads: dict[str, Read], hot: Any,
    dtype: torch.dtype, progress: Progress, layout: str,
) -> None:
    request = _request(source, forms, hot, layout)
    quantizers: list[dict[str, Any]] = []
    layers = _resumed(folder, request, quantizers)
    biases = source.biases()
    _sweep(folder)
    with open(folder / EXPERTS, "r+b" if layers else "wb") as f:
        f.truncate(_end(layers))
        f.seek(0, os.SEEK_END)
        progress(0, len(source.layers))
        for n, layer in enumerate(source.layers):
            if n >= len(layers):
                own = biases.get(layer.path, {})
                layers.append(write_layer(f, layer, forms, own, quantizers, dtype, layout))
                f.flush()
                os.fsync(f.fileno())
                _note(folder, {"layer": asdict(layers[-1]), "quantizers": quantizers})
            progress(n + 1, len(source.layers))
    packed = write_hot(source, reads, folder, dtype, hot)
    _copy_beside(source, folder)
    finish(folder, source.family, dtype, quantizers, layers, packed)


def _sweep(folder: Path) -> None:
    """Remove what an earlier conversion has left but its experts: all else is written again.

    Names with a dot in front are files that it was just writing when it was killed.
    """
    for path in folder.iterdir():
        if path.name in (INDEX, CONFIG, *BESIDE) or path.name.startswith((".", HOT)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _dtype(source: Source, hot: Any) -> torch.dtype:
    """Return the type that is computed in: the source's, or bfloat16."""
    first = next(iter(source.layers[0].experts[0].values()))
    dtype = first.dtype if hot == "raw" or first.dtype == torch.float16 else torch.bfloat16
    if (name := str(dtype).removeprefix("torch.")) not in DTYPES:
        raise ConfigError(f"{first.name} is {name}, and a store computes in {', '.join(DTYPES)}: cast the "
                          f"model first, model.to(torch.float32)")
    return dtype


def _end(layers: list[Layer]) -> int:
    """Return where the last layer that is written ends."""
    last = layers[-1].experts[-1].values() if layers else ()
    return max((m.offset + padded(m.nbytes) for m in last), default=0)


def _request(source: Source, forms: dict[str, Any], hot: Any, layout: str) -> str:
    """Return what two conversions to the same bytes have in common, as a hash."""
    rest = hot if isinstance(hot, str) else written(hot)
    facts: list[Any] = [VERSION, source.config.to_dict(), rest, layout]
    facts.append([(k, written(q), getattr(q, "checksum", None)) for k, q in forms.items()])
    if source.directory is None:
        facts.append(os.urandom(8).hex())  # nobody knows whether a live model is still the same
    else:
        files = sorted(source.directory.glob("*.safetensors"))
        facts += [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _resumed(folder: Path, request: str, quantizers: list[dict[str, Any]]) -> list[Layer]:
    """Return the layers that an earlier conversion of the same request has written."""
    lines = []
    if (folder / JOURNAL).is_file():
        for line in (folder / JOURNAL).read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # it was killed while it wrote this line
    if not lines or lines[0] != {"request": request}:
        (folder / JOURNAL).write_text(json.dumps({"request": request}) + "\n")
        return []
    (folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    layers = [read_layer(line["layer"]) for line in lines[1:]]
    quantizers += lines[-1]["quantizers"] if layers else []
    if not (folder / EXPERTS).is_file() or (folder / EXPERTS).stat().st_size < _end(layers):
        raise FileError(f"{folder} is torn: remove it and convert again")
    return layers


def _note(folder: Path, line: dict[str, Any]) -> None:
    with open(folder / JOURNAL, "a") as f:
        f.write(json.dumps(line) + "\n")
        f.flush()
        os.fsync(f.fileno())


# ------------------------------------------------------------------ all else


def finish(
    folder: Path, family: str, dtype: torch.dtype, quantizers: list[dict[str, Any]], layers: list[Layer],
    hot: dict[str, Any],
) -> None:
    """Write the index of a folder whose other files are there."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != JOURNAL)
    files: dict[str, dict[str, Any]] = {name: {"bytes": (folder / name).stat().st_size} for name in names}
    for name in set(names) - {EXPERTS}:
        files[name]["sha256"] = checksum(folder / name)
    said = str(dtype).removeprefix("torch.")
    write_index(folder, Index(family, said, quantizers, layers, hot, files))


def _copy_beside(source: Source, folder: Path) -> None:
    said = {k: v for k, v in source.config.to_dict().items() if k != "_name_or_path"}  # where it lay
    write_json(folder / CONFIG, said)
    if source.directory is None:
        return
    for name in BESIDE:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, folder / name)
