"""Adapter files of the whole family: PEFT's directories, `.pth` files of RWKV-PEFT and of the paper's demo,
Poise's.

The form is decided by an explicit field or argument and by shapes, never by the word "bone" in a name: that
has meant four different methods.
"""

from __future__ import annotations

import pickle
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError
from poise.files import load_bundle, read_json, read_regular
from poise_bone.components import Bone
from poise_bone.targets import refuse_gaps
from poise_bone.variants import ADDED, VARIANTS

if TYPE_CHECKING:
    from torch import nn

    from poise_bone.attached import AttachedBone

PREFIX = "base_model.model."
KEYS = {"MISS": "miss_block", "BONE": "bone_block"}
PTH_KEYS = ("disha", "bone")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MOST_BYTES = 1 << 36


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it lies in a file.

    Parameters
    ----------
    variant : str
    blocks : mapping of weight name to block
        Shapes as in `poise_bone.functional`.
    source : str
        MISS, BONE, LORA's kin of PEFT; pth; poise.
    dropout : float
    fields : mapping
        The file's own configuration, as read.
    """

    variant: str
    blocks: Mapping[str, Tensor]
    source: str
    dropout: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)

    def bone(self) -> Bone:
        """Return the component that makes these blocks on these layers.

        Raises
        ------
        FileError
            When the blocks do not go together.
        """
        ranks = {name: rank_of(b, self.variant) for name, b in self.blocks.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        first = next(iter(self.blocks.values()))
        # a name is a pattern of endings too: the longest, its own, is the last and counts
        each = sorted(ranks, key=len) if len(set(ranks.values())) > 1 else []
        try:
            return Bone(
                r=usual, variant=self.variant, dropout=self.dropout, target_modules=sorted(self.blocks),
                mini_r=first.shape[1] if self.variant == "mini" else None,
                tiles=list(first.shape[:2]) if self.variant == "bone_free" else [1, 1],
                rank_pattern={name: ranks[name] for name in each})
        except ConfigError as error:
            raise FileError(f"the adapter cannot be built: {error}") from None

    def attach(self, model: nn.Module, name: str = "default") -> AttachedBone:
        """Put the adapter on a model; all of it or nothing.

        Raises
        ------
        FileError
            When the model lacks one of its layers, or a block does not fit one, naming it; for a directory
            of PEFT whose configuration means other layers than there are blocks for.
        """
        others = _others(self, model)
        if self.source in KEYS:
            refuse_gaps(self.fields, self.blocks, model)
        try:
            attached = replace(self.bone(), exclude_modules=others).attach(model, name)
        except ConfigError as error:
            raise FileError(f"the adapter does not fit this model: {error}") from None
        try:
            attached.load_state_dict({f"{n}.D": b for n, b in self.blocks.items()})
        except Exception:
            attached.detach()
            raise
        attached.foreign = dict(self.fields)
        return attached


def rank_of(block: Tensor, variant: str) -> int:
    """Return r of a block."""
    return block.shape[0] if variant in ADDED else block.shape[-1]


def _others(saved: SavedAdapter, model: nn.Module) -> list[str] | None:
    """Return names that end as a block's does and have none; raise `FileError` for layers that lack."""
    from poise.walk import named_tie, untied, weights

    there = list(weights(model))
    have = {w.name for w in there}
    for name in sorted(set(saved.blocks) - have):
        if hit := named_tie(there, name):
            raise FileError(f"the adapter changes {name}, and {untied(*hit)}")
    if missing := sorted(set(saved.blocks) - have):
        raise FileError(f"the adapter has {len(missing)} layers that this model has not, {missing[0]} "
                        f"first: it "
                        f"belongs to another model")
    found = [n for n in have - set(saved.blocks) if any(n.endswith(f".{b}") for b in saved.blocks)]
    return sorted(found) or None


def read_adapter(path: Path | str, variant: str | None = None) -> SavedAdapter:
    """Read an adapter: a directory of PEFT or of Poise, or a `.pth` file.

    Parameters
    ----------
    path : path
    variant : str, optional
        The form of the blocks, where the file does not say: `bat` (a block for each block of outputs) or
        `bat_row` (of inputs) for three-dimensional ones of `.pth` files with the key `bone`; `bat` also
        reads those that are stored flat, (o, r).

    Raises
    ------
    FileError
        For a file that is missing, torn, a pickle of code, of an unknown kind, or not decidable, with what
        to say.
    """
    path = Path(path)
    if variant is not None and variant not in VARIANTS:
        raise ConfigError(f"variant={variant!r} is not allowed: it must be one of {', '.join(VARIANTS)}")
    if (path / CONFIG).exists():
        saved = _read_peft(path)
    elif (path / "adapter.json").exists():
        saved = _read_poise(path)
    elif path.is_dir():
        raise FileError(f"{path} is no adapter: it has neither {CONFIG} (PEFT) nor adapter.json (Poise)")
    else:
        saved = _read_pth(path, variant)
    if variant is not None and saved.variant != variant:
        raise FileError(f"{path} holds {saved.variant}, not {variant}")
    return saved


def _refuse_numbers(path: Path, name: str, block: Tensor) -> None:
    """Raise `FileError` for what is no plain tensor of numbers that fp32, the type of a block, can hold."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    plain = block.layout == torch.strided and not block.is_nested and block.device.type == "cpu"
    # a view that repeats its numbers may claim any size
    if block.dtype not in kinds or not plain or block.nbytes > block.untyped_storage().nbytes():
        raise FileError(f"{path}: the block of {name} is no plain tensor of type fp16, bf16, fp32 or fp64 "
                        f"({block.dtype}, {block.layout}, on {block.device})")
    if not block.numel() or not torch.isfinite(block.float()).all():
        raise FileError(f"{path}: the block of {name} has numbers that are not finite in fp32, or none")


# ------------------------------------------------------------------ PEFT


def _read_peft(folder: Path) -> SavedAdapter:
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in KEYS:
        raise FileError(f"{folder / CONFIG} is of peft_type {kind!r}: {' and '.join(KEYS)} are read")
    _refuse_unread(config, folder)
    variant = _peft_variant(config, folder)
    blocks = {}
    for key, tensor in _peft_tensors(folder).items():
        name, _, last = key.removeprefix(PREFIX).rpartition(".")
        if not key.startswith(PREFIX) or last != KEYS[kind]:
            copied = ": save it in PEFT with save_embedding_layers=False" if ".base_layer." in key else ""
            raise FileError(f"{folder / TENSORS}: {key} is no block of {kind}, {PREFIX}NAME.{KEYS[kind]}"
                            f"{copied}")
        _refuse_numbers(folder / TENSORS, name, tensor)
        blocks[name] = tensor
    saved = SavedAdapter(variant, blocks, kind, _number(config, "miss_dropout", 0.0, folder), config)
    _check_peft_shapes(saved, config, folder)
    return saved


def _refuse_unread(config: Mapping[str, Any], folder: Path) -> None:
    """Raise `FileError` for settings that would otherwise be left out in silence."""
    others = {"bias": "none", "modules_to_save": None, "alpha_pattern": {}, "rank_pattern": {}}
    for key, plain in others.items():
        if config.get(key, plain) not in (plain, None, [], {}):
            raise FileError(f"{folder / CONFIG}: {key}={config[key]!r} is not read here: only {plain!r} is")
    for key in ("target_modules", "exclude_modules"):
        if not isinstance(config.get(key), (str, list, type(None))):
            raise FileError(f"{folder / CONFIG}: {key}={config[key]!r} is no list of names, and no string")


def _peft_variant(config: Mapping[str, Any], folder: Path) -> str:
    """`init_weights` says the form; a boolean says how the blocks began."""
    said = config.get("init_weights", True)
    forms = {"bat": "bat", "mini": "mini"}
    if isinstance(said, bool):
        return "bone"
    if not isinstance(said, str) or said not in forms:
        raise FileError(f"{folder / CONFIG}: init_weights={said!r} is not known: it is true, false, bat or "
                        f"mini")
    return forms[said]


def _number(config: Mapping[str, Any], key: str, default: Any, folder: Path) -> Any:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FileError(f"{folder / CONFIG}: {key}={value!r} is no number")
    return value


def _peft_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not (folder / TENSORS).exists():
        pickled = folder / "adapter_model.bin"
        more = f"; {pickled.name} is a pickle: save the adapter again as safetensors"
        raise FileError(f"{folder / TENSORS} is missing{more if pickled.exists() else ''}")
    try:
        tensors = load(read_regular(folder / TENSORS, MOST_BYTES))
    except (SafetensorError, KeyError) as error:  # a KeyError: numbers of a kind that it does not read
        raise FileError(f"{folder / TENSORS} holds no tensors (torn or altered): {error}") from None
    if not tensors:
        raise FileError(f"{folder / TENSORS} holds no tensor")
    return dict(sorted(tensors.items()))  # the library gives them in an order of its own


def _check_peft_shapes(saved: SavedAdapter, config: Mapping[str, Any], folder: Path) -> None:
    r = _number(config, "r", 64, folder)
    for name, block in saved.blocks.items():
        dims = 3 if saved.variant == "bat" else 2
        square = saved.variant != "bat" or block.shape[-2:] == (r, r)
        if block.ndim != dims or rank_of(block, saved.variant) != r or not square:
            raise FileError(f"{folder / TENSORS}: the block of {name} has shape {tuple(block.shape)}; "
                            f"r={r} and "
                            f"init_weights={config.get('init_weights', True)!r} need "
                            f"{_wanted(saved.variant, r)}")
        if saved.variant == "mini" and block.shape[1] != _number(config, "mini_r", 1, folder):
            raise FileError(f"{folder / TENSORS}: the block of {name} has {block.shape[1]} columns, mini_r "
                            f"is {config.get('mini_r', 1)}")


def _wanted(variant: str, r: int) -> str:
    return {"bat": f"(outputs / {r}, {r}, {r})", "mini": f"({r}, mini_r)"}.get(variant, f"({r}, outputs)")


# ------------------------------------------------------------------ pth


def _read_pth(path: Path, variant: str | None) -> SavedAdapter:
    found = _pth_tensors(path)
    blocks, kinds = {}, set()
    for key, tensor in found.items():
        name, _, last = key.rpartition(".")
        if last in PTH_KEYS:
            _refuse_numbers(path, name, tensor)
            blocks[name] = tensor
            kinds.add(last)
    if not blocks or len(kinds) > 1:
        raise FileError(f"{path} has no keys NAME.disha or NAME.bone, or both: it is no adapter of "
                        f"RWKV-PEFT or of "
                        f"the paper's demo")
    if others := sorted(set(found) - {f"{n}.{k}" for n in blocks for k in kinds}):
        raise FileError(f"{path} holds more than blocks ({others[0]} first of {len(others)}), which would "
                        f"be left "
                        f"out: take those out of the file")
    return _pth_form(path, blocks, kinds.pop(), variant)


def _pth_tensors(path: Path) -> dict[str, Tensor]:
    import io
    import zipfile

    data = read_regular(path, MOST_BYTES)
    try:
        if zipfile.is_zipfile(io.BytesIO(data)) and (bad := zipfile.ZipFile(io.BytesIO(data)).testzip()):
            raise ValueError(f"the checksum of {bad} is not right")  # torch does not look at them
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError,
            zipfile.BadZipFile, zlib.error, OSError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileError(f"{path} is no file of tensors (torn, or a pickle of code, which is never run): "
                        f"{said[:200]}") from None
    tensors = isinstance(found, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    if not tensors:
        raise FileError(f"{path} is no mapping of names to tensors")
    return found


def _pth_form(path: Path, blocks: dict[str, Tensor], key: str, variant: str | None) -> SavedAdapter:
    dims = {b.ndim for b in blocks.values()}
    if dims == {3}:
        if variant is None and key == "bone":
            raise FileError(f"{path}: three-dimensional blocks under the key bone are bat in the paper's "
                            f"demo and "
                            f"bat_row in RWKV-PEFT of 2024: say variant='bat' or variant='bat_row'")
        form = variant or "bat_row"
        if bad := [n for n, b in blocks.items() if b.shape[1] != b.shape[2]]:
            raise FileError(f"{path}: the block of {bad[0]} is {tuple(blocks[bad[0]].shape)}, not (n, r, "
                            f"r)")
        return SavedAdapter(form, blocks, "pth")
    if dims != {2}:
        raise FileError(f"{path}: blocks have {sorted(dims)} dimensions: two (bone) or three (bat) are "
                        f"read")
    if variant == "bat" or (variant is None and _are_flat(path, blocks)):
        return SavedAdapter("bat", {n: _unflattened(path, n, b) for n, b in blocks.items()}, "pth")
    return SavedAdapter(variant or "bone", blocks, "pth")


def _are_flat(path: Path, blocks: dict[str, Tensor]) -> bool:
    """Tell (o, r) from (r, o): one side is the same in all layers."""
    rows, columns = ({b.shape[side] for b in blocks.values()} for side in (0, 1))
    if len(rows) == 1 and len(columns) == 1:
        return _smaller_side(path, rows.pop(), columns.pop())
    if len(rows) > 1 and len(columns) > 1:
        raise FileError(f"{path}: blocks have neither one number of rows nor one of columns: say "
                        f"variant='bone' "
                        f"(r, outputs) or variant='bat' (outputs, r)")
    return len(columns) == 1


def _smaller_side(path: Path, rows: int, columns: int) -> bool:
    if rows == columns:
        raise FileError(f"{path}: blocks are {rows} x {columns}, which may be (r, outputs) or (outputs, "
                        f"r): say "
                        f"variant='bone' or variant='bat'")
    return columns < rows


def _unflattened(path: Path, name: str, block: Tensor) -> Tensor:
    o, r = block.shape
    if o % r:
        raise FileError(f"{path}: the block of {name} is {(o, r)}: {o} outputs are no multiple of r={r}")
    return block.reshape(o // r, r, r)


# ------------------------------------------------------------------ Poise


def _read_poise(folder: Path) -> SavedAdapter:
    tensors, meta = load_bundle(folder / "adapter")
    options = meta.get("options")
    if meta.get("entry") != "bone" or not isinstance(options, dict):
        raise FileError(f"{folder} is no adapter of bone (entry {meta.get('entry')!r})")
    named = {k.removeprefix("adapter.").removesuffix(".D"): t for k, t in tensors.items()}
    for name, tensor in named.items():
        _refuse_numbers(folder, name, tensor)
    scale, variant = options.get("scale", 1.0), options.get("variant", "bone")
    if scale != 1.0:
        raise FileError(f"{folder} has scale={scale!r}: poise.load_adapter reads it, or save_peft, which "
                        f"folds it in")
    return SavedAdapter(variant, named, "poise", options.get("dropout", 0.0), options)
