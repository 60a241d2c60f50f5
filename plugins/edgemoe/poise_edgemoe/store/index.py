"""The index of a store: what lies where, in which form, with which checksum; all of it checked when read.

A store is a folder: `experts.bin` (a blob for each expert, each of its matrices starting at a multiple of
4,096), `hot*.safetensors` (all else), `config.json`, the tokenizer's files, and `index.json`, which is
written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poise.errors import FileError
from poise.files import checksum, read_json, write_json
from poise_edgemoe.store.schemes import read_quantizer

KIND, VERSION, PLANED = "poise experts", 1, 2  # the second: of a store in planes, which older ones refuse
INDEX, EXPERTS, HOT, CONFIG = "index.json", "experts.bin", "hot", "config.json"
PAGE, LINE = 4096, 64  # matrices begin at pages, their tensors at cache lines
DTYPES = ("float32", "bfloat16", "float16")
SERVED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "granitemoe",
          "gpt_oss", "phimoe", "switch_transformers")
PARTS = ("gate_up", "wi", "down", "wo")  # of an expert, in the order in which it uses them
LOW = "_low"  # after the name of a part: its second plane
_NAME, _SHA = re.compile(r"(?!\.+$)[\w.-]{1,200}", re.ASCII), re.compile(r"[0-9a-f]{64}")


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

    @property
    def planes(self) -> int:
        """In how many planes experts are stored, each of which begins at a page: 1 or 2.

        Of two, the bases of an expert's parts come first, then what refines them (`part + LOW`).
        """
        return max((form.get("planes", 1) for form in self.quantizers), default=1)

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
    body = {"kind": KIND, "version": VERSION if index.planes == 1 else PLANED, **asdict(index)}
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
    version = said.get("version")
    if type(version) is not int or version not in (VERSION, PLANED):
        raise FileError(f"{path} has version {version!r}; this Poise reads {VERSION} and {PLANED}: convert "
                        f"the model again, or update")
    if said.get("checksum") != _own({k: v for k, v in said.items() if k != "checksum"}):
        raise FileError(f"{path} is altered: its checksum does not match")
    try:
        index = _parsed(said)
    except ValueError as error:
        raise FileError(f"{path} is no index of a store: {error}") from None
    for form in index.quantizers:
        read_quantizer(form, str(path))
    if (of := VERSION if index.planes == 1 else PLANED) != version:
        raise FileError(f"{path} has version {version}, and what it says is of version {of}: it is altered")
    _check_files(Path(folder), index)
    _check_family(Path(folder), index)
    _check_blobs(path, index)
    return index


# ------------------------------------------------------------------ what it says, field by field


def _fields(said: Any, what: str, **kinds: type) -> dict[str, Any]:
    """Return a mapping that has these fields and no others, each of exactly its type: true is no integer.

    Raises
    ------
    ValueError
        Naming the first field that is missing, unknown, or of another type.
    """
    if type(said) is not dict:
        raise ValueError(f"{what} is {said!r:.40}, not an object")
    if odd := sorted(said.keys() ^ kinds.keys()):
        raise ValueError(f"{what} {'lacks' if odd[0] in kinds else 'has an unknown'} {odd[0]!r}")
    for name, kind in kinds.items():
        if type(said[name]) is not kind:
            raise ValueError(f"{name!r} of {what} is {said[name]!r:.40}, not of the type {kind.__name__}")
    return said


def _list(said: list[Any], what: str, kind: type) -> list[Any]:
    """Return a list whose members are of exactly one type, and are no empty texts."""
    if odd := [one for one in said if type(one) is not kind or one == ""]:
        raise ValueError(f"{what} holds {odd[0]!r:.40}, not of the type {kind.__name__}")
    return said


def read_layer(said: Any) -> Layer:
    """Return a layer from plain values.

    Raises
    ------
    ValueError
        For a value that no layer has.
    """
    _fields(said, "a layer", path=str, encoder=bool, shapes=dict, biased=list, transposed=bool,
            experts=list)
    what = f"layer {said['path']!r}"
    if not said["shapes"] or not said["experts"]:
        raise ValueError(f"{what} has no experts")
    for part, shape in said["shapes"].items():
        if part not in PARTS or type(shape) is not list or [type(n) for n in shape] != [int, int]:
            raise ValueError(f"{what} has a part {part!r} of shape {shape!r:.40}")
        if min(shape) < 1:
            raise ValueError(f"{what} has a part {part!r} of shape {shape}")
    if not {*_list(said["biased"], f"'biased' of {what}", str)} <= said["shapes"].keys():
        raise ValueError(f"{what} has biases of parts that it does not have")
    experts = [{part: _matrix(m, f"{part} of expert {e} in {what}") for part, m in one.items()}
               for e, one in enumerate(_list(said["experts"], f"'experts' of {what}", dict))]
    return Layer(**{**said, "experts": experts})


def _matrix(said: Any, what: str) -> Matrix:
    return Matrix(**_fields(said, what, offset=int, nbytes=int, form=int, crc=int))


def _parsed(said: dict[str, Any]) -> Index:
    _fields(said, "it", kind=str, version=int, family=str, dtype=str, quantizers=list, layers=list,
            hot=dict, files=dict, checksum=str)
    if not said["layers"]:
        raise ValueError("it has no layers")
    if said["dtype"] not in DTYPES:
        raise ValueError(f"the type {said['dtype']!r} is not known here ({', '.join(DTYPES)} are)")
    if hot := said["hot"]:
        _list(_fields(hot, "'hot'", quantizer=dict, packed=list)["packed"], "'packed' of 'hot'", str)
    layers = [read_layer(one) for one in said["layers"]]
    return Index(said["family"], said["dtype"], _list(said["quantizers"], "'quantizers'", dict), layers,
                 said["hot"], _parsed_files(said["files"]))


def _parsed_files(said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for name, facts in said.items():
        if not _NAME.fullmatch(name) or name == INDEX:
            raise ValueError(f"it names {name!r:.60}: only files beside it are read")
        more = {} if name == EXPERTS else {"sha256": str}
        _fields(facts, f"file {name}", bytes=int, **more)
        if more and not _SHA.fullmatch(facts["sha256"]):
            raise ValueError(f"'sha256' of file {name} is {facts['sha256']!r:.40}, no checksum")
    if lost := [name for name in (EXPERTS, CONFIG) if name not in said]:
        raise ValueError(f"'files' lacks {lost[0]!r}")
    return said


# ------------------------------------------------------------------ what it says, against the files


def _check_files(folder: Path, index: Index) -> None:
    for name, facts in index.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise FileError(f"{path} is missing, or no regular file")
        if path.stat().st_size != facts["bytes"]:
            raise FileError(f"{path} is torn: {path.stat().st_size} bytes instead of {facts['bytes']}")
        # experts and hot weights are checked when they are read
        if name != EXPERTS and not name.startswith(HOT) and checksum(path) != facts["sha256"]:
            raise FileError(f"{path} is altered: its checksum does not match")


def _check_family(folder: Path, index: Index) -> None:
    """Refuse a store whose configuration is of another family: its class would have other modules."""
    config = read_json(folder / CONFIG)
    own = config.get("model_type") if isinstance(config, dict) else None
    if index.family not in SERVED or own != index.family:
        raise FileError(f"{folder / INDEX} is of the family {index.family!r:.40}, {CONFIG} of {own!r:.40}: "
                        f"both must be one of {', '.join(SERVED)}")


def _check_blobs(path: Path, index: Index) -> None:
    end = 0
    for n, e, matrices in index.blobs():
        where = f"expert {e} in layer {n}"
        shapes = list(index.layers[n].shapes)
        there = shapes if index.planes == 1 else [*shapes, *(part + LOW for part in shapes)]
        if set(matrices) != set(there):
            raise FileError(f"{path}: {where} lacks a part, or has one too many: its layer has "
                            f"{', '.join(there)}")
        if index.planes > 1 and not all(part.endswith(LOW) for part in list(matrices)[len(shapes):]):
            raise FileError(f"{path}: the bases of {where} do not come before what refines them")
        for part, m in matrices.items():
            if not 0 <= m.form < len(index.quantizers):
                raise FileError(f"{path}: {part} of {where} is in no form that the index knows")
            if index.quantizers[m.form].get("planes", 1) != index.planes:
                raise FileError(f"{path}: {part} of {where} is in one plane, and others are in two")
            if m.offset != end or m.nbytes < 1:
                raise FileError(f"{path}: {part} of {where} does not begin at {end}, where the one "
                                f"before it ends")
            end = m.offset + padded(m.nbytes)
    if end != index.files[EXPERTS]["bytes"]:
        there = index.files[EXPERTS]["bytes"]
        raise FileError(f"{path}: the experts end at {end}, and {EXPERTS} has {there} bytes")
