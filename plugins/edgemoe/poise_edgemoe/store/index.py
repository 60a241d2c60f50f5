"""The index of a store: what lies where, in which form, with which checksum; all of it checked when read.

A store is a folder: `experts.bin` (a blob for each expert, each of its matrices starting at a multiple of
4,096), `hot*.safetensors` (all else), `config.json`, the tokenizer's files, and `index.json`, which is
written last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poise.errors import FileError
from poise.files import checksum, read_json, write_json
from poise_edgemoe.store.schemes import read_quantizer

KIND, VERSION = "poise experts", 1
INDEX, EXPERTS, HOT = "index.json", "experts.bin", "hot"
PAGE, LINE = 4096, 64  # matrices begin at pages, their tensors at cache lines
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Matrix:
    """Where one matrix of an expert lies.

    Parameters
    ----------
    offset : int
        In `experts.bin`; a multiple of `PAGE`.
    nbytes : int
        Codes, scales and bias; what follows up to the next page is zero.
    form : int
        Which of the index's quantizers stored it.
    crc : int
        zlib's CRC-32 of these bytes.
    """

    offset: int
    nbytes: int
    form: int
    crc: int


@dataclass(frozen=True)
class Layer:
    """One block with experts.

    Parameters
    ----------
    path : str
        The module that holds the experts.
    shapes : dict
        Part to (out, in).
    biased : list of str
        Parts with a bias.
    transposed : bool
        Whether the model multiplies by (in, out), as gpt-oss does: raw matrices lie that way round.
    """

    path: str
    encoder: bool
    shapes: dict[str, list[int]]
    biased: list[str]
    transposed: bool
    experts: list[dict[str, Matrix]]


@dataclass(frozen=True)
class Index:
    """What is in a store.

    Parameters
    ----------
    family : str
        transformers' `model_type`.
    dtype : str
        Type of the hot weights, and of what is computed.
    quantizers : list of dict
        Registered names and options; `Matrix.form` counts them.
    hot : dict
        What stores hot matrices, and which, where they are packed.
    files : dict
        Name to bytes, and SHA-256 of all but `experts.bin`.
    """

    family: str
    dtype: str
    quantizers: list[dict[str, Any]]
    layers: list[Layer]
    hot: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def blobs(self) -> Iterator[tuple[int, int, dict[str, Matrix]]]:
        """Yield (layer, expert, matrices) in the order of the file."""
        for n, layer in enumerate(self.layers):
            for e, matrices in enumerate(layer.experts):
                yield n, e, matrices


def padded(n: int, to: int = PAGE) -> int:
    """Return the next multiple."""
    return -(-n // to) * to


def places(layout: dict[str, tuple[tuple[int, ...], Any]], bias: tuple[int, Any] | None) -> dict[str, Any]:
    """Return where each tensor of a matrix lies: name to (offset, bytes, shape, dtype).

    Parameters
    ----------
    layout : dict
        As a quantizer's `layout` gives it.
    bias : (out, dtype) or None
    """
    found, at = {}, 0
    every = {**layout, **({} if bias is None else {"bias": ((bias[0],), bias[1])})}
    for name, (shape, dtype) in every.items():
        size = math.prod(shape) * dtype.itemsize
        found[name] = (at, size, tuple(shape), dtype)
        at = padded(at + size, LINE)
    return found


def payload(found: dict[str, Any]) -> int:
    """Return the bytes from the first tensor to the end of the last."""
    return max(at + size for at, size, _, _ in found.values())


def write_index(folder: Path, index: Index) -> None:
    """Write the index, last of all files."""
    body = {"kind": KIND, "version": VERSION, **asdict(index)}
    write_json(folder / INDEX, {**body, "checksum": _own(body)})


def _own(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path | str) -> Index:
    """Read an index and check it, and the sizes of the files that it names.

    Raises
    ------
    FileError
        For a store that is none, torn, altered, of a newer version, or whose blobs overlap or lie outside.
    """
    path = Path(folder) / INDEX
    if path.is_symlink() or not path.is_file():
        raise FileError(f"{folder} is no store: it has no {INDEX} (a conversion that did not end leaves "
                        f"none)")
    said = read_json(path)
    if not isinstance(said, dict) or said.get("kind") != KIND:
        raise FileError(f"{path} is no index of a store")
    if said.get("version") != VERSION:
        raise FileError(f"{path} has version {said.get('version')}; this Poise reads {VERSION}: convert "
                        f"the model again, or update")
    if said.get("checksum") != _own({k: v for k, v in said.items() if k != "checksum"}):
        raise FileError(f"{path} is altered: its checksum does not match")
    try:
        index = _parsed(said)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileError(f"{path} is no index of a store: {type(error).__name__}: {error}") from None
    for form in index.quantizers:
        read_quantizer(form, str(path))
    _check_files(Path(folder), index)
    _check_blobs(path, index)
    return index


def read_layer(said: dict[str, Any]) -> Layer:
    """Return a layer from plain values."""
    experts = [{part: Matrix(**m) for part, m in one.items()} for one in said["experts"]]
    return Layer(**{**said, "experts": experts})


def _parsed(said: dict[str, Any]) -> Index:
    layers = [read_layer(one) for one in said["layers"]]
    return Index(said["family"], said["dtype"], said["quantizers"], layers, said["hot"], said["files"])


def _check_files(folder: Path, index: Index) -> None:
    for name, facts in index.files.items():
        path = folder / name
        if Path(name).name != name:
            raise FileError(f"{folder / INDEX} names {name!r}: only files beside it are read")
        if path.is_symlink() or not path.is_file():
            raise FileError(f"{path} is missing, or no regular file")
        if path.stat().st_size != facts["bytes"]:
            raise FileError(f"{path} is torn: {path.stat().st_size} bytes instead of {facts['bytes']}")
        # experts and hot weights are checked when they are read
        if name != EXPERTS and not name.startswith(HOT) and checksum(path) != facts["sha256"]:
            raise FileError(f"{path} is altered: its checksum does not match")


def _check_blobs(path: Path, index: Index) -> None:
    end = 0
    if index.dtype not in DTYPES:
        raise FileError(f"{path}: the type {index.dtype!r} is not known here")
    for n, e, matrices in index.blobs():
        for part, m in matrices.items():
            where = f"{path}: {part} of expert {e} in layer {n}"
            if set(matrices) != set(index.layers[n].shapes) or not 0 <= m.form < len(index.quantizers):
                raise FileError(f"{where} is in no form that the index knows")
            if m.offset % PAGE or m.offset < end or m.nbytes < 1:
                raise FileError(f"{where} overlaps another, or does not begin at a page")
            end = m.offset + padded(m.nbytes)
    if end != index.files[EXPERTS]["bytes"]:
        there = index.files[EXPERTS]["bytes"]
        raise FileError(f"{path}: the experts end at {end}, and {EXPERTS} has {there} bytes")
