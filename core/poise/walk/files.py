"""The walk over a directory of safetensors: headers at once, tensors when they are read, no model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, FileError
from poise.files import read_json
from poise.walk.families import Family, family, part_name, placed
from poise.walk.plain import joined
from poise.walk.weight import Expert, Weight

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDING = re.compile(r"(.*_)?(embed\w*|wte|wpe|shared|relative_attention_bias)")
_TIES = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
MAPPED = 1 << 26  # bytes that are read before files are opened anew: pages of a map stay in memory
_FOREIGN = ("_blocks", "_scales", "_scale_inv")  # MXFP4 and FP8 beside their scales


def open_weights(directory: Path | str) -> Iterator[Weight]:
    """Yield the weights that `weights(from_pretrained(directory))` would, read from safetensors on demand.

    Names, roles, shapes and values are those of the loaded model: experts that a file keeps apart are put
    together when read, and named as in memory. `module` is None, and `write` is refused.

    Parameters
    ----------
    directory : path
        A transformers directory: config.json, and model.safetensors or shards with their index.

    Raises
    ------
    FileError
        For a file that is missing or torn, a tensor that the index does not find, or weights in a format
        with scales of its own (MXFP4, FP8).
    """
    files, config, kind = _opened(directory)
    found: dict[str, list[_Piece]] = {}
    for key in sorted(files.shapes, key=_natural):
        if (piece := _piece(key, files, config, kind)) is not None:
            found.setdefault(piece.name, []).append(piece)
    _refuse_gaps(found, files)
    every = (w for name, pieces in found.items() for w in _weights(files, name, pieces, kind))
    for weight in placed(every, {"": kind}):
        router = weight.role == "router"
        yield _tied(replace(weight, replaceable=kind.plain_router) if router else weight, config)


def _opened(directory: Path | str) -> tuple[_Files, dict[str, Any], Family]:
    """Return the files of a directory, its configuration and its family."""
    files = _Files(Path(directory))
    config = read_json(Path(directory) / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str | None):
        raise FileError(f"{directory}/config.json is no model's configuration")
    files.cast(config)
    tied = config.get("tie_word_embeddings", "lm_head.weight" not in files.shapes)
    config = {**config, "tie_word_embeddings": tied}  # classes differ in what they mean by leaving it out
    return files, config, family(config.get("model_type"))


def open_others(
    directory: Path | str, in_full: Callable[[str], bool] = lambda key: False
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield what `open_weights` leaves out of a plain state, and what it yields but for experts.

    Keys are those of the loaded model's `state_dict`; a tied head is left out, biases of experts are there.

    Parameters
    ----------
    in_full : callable
        Tells of a key whether its tensor is read in float32, whatever the configuration names.
    """
    files, config, kind = _opened(directory)
    for key in sorted(files.shapes, key=_natural):
        piece = _piece(key, files, config, kind)
        if _left_out(key, config) or (piece is not None and (piece.expert or piece.fused)):
            continue
        live = piece.state_key if piece is not None else _live_key(key, kind)
        if in_full(live):
            files.dtypes[key] = _dtype("F32")
        yield live, partial(files.read, key)


def _live_key(key: str, kind: Family) -> str:
    """Return the key in memory of a tensor that is no weight of the walk's: a norm, a bias."""
    hit = re.fullmatch(rf"{_block(kind)}\.(?P<rest>.+)", key)
    if hit is None or not (kind.disk_block or kind.disk_router):
        return key
    rest = hit["rest"]
    if kind.disk_router and rest.startswith(f"{kind.disk_router}."):
        rest = kind.router[0] + rest.removeprefix(kind.disk_router)
    return f"{_live_block(hit, kind)}.{rest}"


def _refuse_gaps(found: dict[str, list[_Piece]], files: _Files) -> None:
    """Raise `FileError` for a block whose experts are not numbered from 0 on without a gap."""
    blocks: dict[str, set[int]] = {}
    for name, pieces in found.items():
        if pieces[0].expert:
            blocks.setdefault(name.rpartition(".experts.")[0], set()).add(pieces[0].expert[0])
    for block, numbers in blocks.items():
        if gaps := set(range(max(numbers) + 1)) - numbers:
            raise FileError(f"{files.directory}: expert {min(gaps)} of {block} is missing")


class _Files:
    """The safetensors files of a directory: which holds what, in which shape and type."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}
        self._mapped = 0
        self.home: dict[str, str] = {}
        self.wanted: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, Any] = {}
        for name in self._names():
            handle = self._handle(name)
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                self.home[key] = name
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())
                self.dtypes[key] = _dtype(handle.get_slice(key).get_dtype())
        if lost := sorted(self.wanted - self.home.keys()):
            raise FileError(f"{self.directory}: no shard holds {lost[0]}, which the index names")

    def cast(self, config: dict[str, Any]) -> None:
        """Read weights in the type that the configuration names, as `from_pretrained` does."""
        import torch

        named = config.get("dtype") or config.get("torch_dtype")
        wanted = getattr(torch, named, None) if isinstance(named, str) else None
        if isinstance(wanted, torch.dtype):
            self.dtypes = {k: wanted if isinstance(v, torch.dtype) else v for k, v in self.dtypes.items()}

    def _names(self) -> list[str]:
        index = self.directory / "model.safetensors.index.json"
        if (self.directory / "model.safetensors").is_file():  # as transformers, which prefers the one file
            return ["model.safetensors"]
        if index.is_file():
            mapped = read_json(index)
            if not isinstance(mapped, dict) or not isinstance(mapped.get("weight_map"), dict):
                raise FileError(f"{index} has no weight_map (torn or altered)")
            self.wanted = set(mapped["weight_map"])
            return sorted({_inside(index, name) for name in mapped["weight_map"].values()})
        if not self.directory.is_dir():
            raise FileError(f"{self.directory} is no directory")
        raise FileError(f"{self.directory} has no safetensors files (one, or shards and an index)")

    def _handle(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self._open:
            if not (self.directory / name).is_file():  # a pipe would keep its reader waiting
                raise FileError(f"{self.directory / name} is missing or torn: it is no regular file")
            try:
                self._open[name] = safe_open(str(self.directory / name), framework="pt")
            except (OSError, SafetensorError) as error:
                raise FileError(f"{self.directory / name} is missing or torn: {error}") from None
        return self._open[name]

    def read(self, key: str, at: slice | int | None = None) -> Tensor:
        """Return a tensor, or some of its first axis, of one shard."""
        handle = self._handle(self.home[key])
        if at is None:
            found = handle.get_tensor(key)
        elif isinstance(at, int):
            found = handle.get_slice(key)[at : at + 1][0]
        else:
            found = handle.get_slice(key)[at] if (at.step or 1) == 1 else handle.get_tensor(key)[at]
        self._mapped += found.numel() * found.element_size()
        if self._mapped > MAPPED:
            self._open.clear()
            self._mapped = 0
        return found.to(self.dtypes[key])


def _inside(index: Path, name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise FileError(f"{index} names {name!r}: only safetensors files beside it are read")
    return name


def _dtype(code: str) -> Any:
    import torch

    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(code, code)


def _natural(key: str) -> list[Any]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"[.]", key)]


@dataclass(frozen=True)
class _Piece:
    """A tensor on disk, and the weight that it is (a part of).

    Parameters
    ----------
    name : str
        Live name of the weight; of a fused tensor, of the module that holds it.
    row : int
        Where among the rows of the weight it stands.
    fused : str
        Live parameter of a tensor that holds all experts; empty otherwise.
    """

    name: str
    key: str
    row: int = 0
    state_key: str = ""
    fused: str = ""
    expert: tuple[int, str] | None = field(default=None)


def _piece(key: str, files: _Files, config: dict[str, Any], kind: Family) -> _Piece | None:
    """Say which weight a tensor on disk belongs to; None: to none of the walk's."""
    if key.endswith(_FOREIGN):
        raise FileError(f"{files.directory}: {key} belongs to a format with scales of its own (MXFP4, "
                        f"FP8), which is not read: save the model in bfloat16")
    if _left_out(key, config) or len(files.shapes[key]) < 2 or key.endswith("bias"):
        return None
    return _of_expert(key, kind) or _fused(key, len(files.shapes[key]), kind) or _ordinary(key, kind)


def _left_out(key: str, config: dict[str, Any]) -> bool:
    """Tell whether from_pretrained leaves a tensor out: a tied head, a layer beyond the last."""
    layers, hit = config.get("num_hidden_layers"), re.match(r"model\.layers\.(\d+)\.", key)
    beyond = hit is not None and isinstance(layers, int) and int(hit[1]) >= layers
    return beyond or (key == "lm_head.weight" and bool(config.get("tie_word_embeddings")))


def _block(kind: Family) -> str:
    return rf"(?P<prefix>(?:.*\.)?)(?P<block>{kind.disk_block or kind.block})"


def _live_block(hit: re.Match[str], kind: Family) -> str:
    return hit["prefix"] + (kind.block if kind.disk_block else hit["block"])


def _of_expert(key: str, kind: Family) -> _Piece | None:
    """Recognise a matrix of one expert that is a tensor of its own: `experts.3.w1.weight`."""
    hit = re.fullmatch(rf"{_block(kind)}\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight", key)
    if hit is None:
        return None
    for part, names in kind.parts.items():
        if hit["part"] in names:
            experts, number = f"{_live_block(hit, kind)}.experts", int(hit["number"])
            return _Piece(f"{experts}.{number}.{part}", key, names.index(hit["part"]),
                          f"{experts}.{part}_proj", expert=(number, part))
    return None


def _fused(key: str, dimensions: int, kind: Family) -> _Piece | None:
    """Recognise a tensor that holds all experts of a block."""
    for part, name in kind.fused.items():
        if hit := re.fullmatch(rf"{_block(kind)}\.{re.escape(name)}", key):
            return _Piece(f"{_live_block(hit, kind)}.experts", key, fused=f"{part}_proj")
    hit = re.fullmatch(r"(?P<path>(?:.*\.)?experts)\.(?P<parameter>\w+)", key)
    if hit and dimensions == 3:
        return _Piece(hit["path"], key, fused=hit["parameter"])
    return None


def _ordinary(key: str, kind: Family) -> _Piece:
    router = kind.disk_router or kind.router[0]
    if hit := re.fullmatch(rf"{_block(kind)}\.{re.escape(router)}\.weight", key):
        live = f"{_live_block(hit, kind)}.{kind.router[0] if kind.disk_router else router}"
        return _Piece(live, key, state_key=f"{live}.weight")
    return _Piece(key.removesuffix(".weight"), key, state_key=key)


def _weights(files: _Files, name: str, pieces: list[_Piece], kind: Family) -> Iterator[Weight]:
    """Yield the weights that some pieces of one name make up."""
    fused = [p for p in pieces if p.fused]
    for number in range(files.shapes[fused[0].key][0] if fused else 0):
        for piece in fused:
            yield _slice_of_fused(files, name, piece, number, kind)
    if not fused:
        yield _whole(files, name, sorted(pieces, key=lambda p: p.row), kind)


def _slice_of_fused(files: _Files, path: str, piece: _Piece, number: int, kind: Family) -> Weight:
    shape = files.shapes[piece.key][1:][:: -1 if kind.transposed else 1]
    part = part_name(piece.fused)

    def read(rows: slice | None) -> Tensor:
        one = files.read(piece.key, number)
        one = one.T if kind.transposed else one
        return one if rows is None else one[rows]

    return _weight(files, joined(path, str(number), part), "expert", shape, piece.key,
                   joined(path, piece.fused), read, key=number, expert=Expert(-1, number, part),
                   plain=(lambda t: t.T) if kind.transposed else (lambda t: t), index=number)


def _whole(files: _Files, name: str, pieces: list[_Piece], kind: Family) -> Weight:
    import torch

    first, shapes = pieces[0], [files.shapes[p.key] for p in pieces]
    if first.expert and [p.row for p in pieces] != list(range(len(kind.parts[first.expert[1]]))):
        there = ", ".join(p.key for p in pieces)
        raise FileError(f"{files.directory}: {name} is not whole: only {there} is there")
    if len({s[1:] for s in shapes}) > 1:
        raise FileError(f"{files.directory}: {', '.join(p.key for p in pieces)} do not stack: {shapes}")
    flip = name.rpartition(".")[2] in kind.flipped
    rows_of = sum(s[0] for s in shapes)
    shape = (shapes[0][1], rows_of) if flip else (rows_of, math.prod(shapes[0][1:]))
    one = len(pieces) == 1 and not flip

    def read(rows: slice | None) -> Tensor:
        if one and rows is not None and rows.start is not None and rows.start >= 0 and rows.stop:
            return files.read(first.key, rows).reshape(-1, shape[1])
        parts = [files.read(p.key) for p in pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole.T if flip else whole.reshape(shape)
        return whole if rows is None else whole[rows]

    expert = Expert(-1, *first.expert) if first.expert else None
    role = "expert" if expert else _role(name, first.key, len(shapes[0]))
    plain: Callable[[Tensor], Tensor] = (lambda t: t.T) if flip else (lambda t: t.reshape(shapes[0]))
    if expert:
        plain = lambda t: t  # noqa: E731
    return _weight(files, name, role, shape, first.key, first.state_key, read, expert=expert, plain=plain,
                   index=first.expert[0] if first.expert else None)


def _role(name: str, key: str, dimensions: int) -> str:
    if not key.endswith(".weight"):
        return "other"
    if dimensions > 2:
        return "conv"
    return "embedding" if _EMBEDDING.fullmatch(name.rpartition(".")[2]) else "linear"


def _weight(
    files: _Files, name: str, role: str, shape: tuple[int, ...], disk: str, state_key: str,
    read: Callable[[slice | None], Tensor], *, key: Any = None, **rest: Any,
) -> Weight:
    if not hasattr(files.dtypes[disk], "itemsize"):
        raise FileError(f"{files.directory}: {disk} is of type {files.dtypes[disk]}: weights are "
                        f"read in F64, F32, F16 and BF16")

    def write(tensor: Tensor) -> None:
        raise ConfigError(f"{name} lies in {files.directory / files.home[disk]}: files are read only")

    return Weight(name, role, (shape[0], shape[1]), files.dtypes[disk], state_key, None, disk,
                  (str(files.directory), disk, key), read, write, replaceable=role != "other",
                  **rest)


def _tied(weight: Weight, config: dict[str, Any]) -> Weight:
    """Name the weights that a loaded model would share with the input embedding."""
    both = bool(config.get("is_encoder_decoder"))
    first = "shared" if both else "model.embed_tokens"
    if weight.name != first or not config.get("tie_word_embeddings"):
        return weight
    return replace(weight, tied_with=tuple(t for t in _TIES if both or t == "lm_head"))
