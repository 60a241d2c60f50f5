"""Directories that PEFT reads: its MISS, its former BONE, and LoRA."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError
from poise.files import write_bytes, write_json
from poise.walk import Weight, weights
from poise_bone.functional import to_lora
from poise_bone.reading import CONFIG, KEYS, PREFIX, TENSORS, read_adapter
from poise_bone.variants import ADDED

if TYPE_CHECKING:
    from torch import nn

    from poise_bone.attached import AttachedBone

FORMS = {"bone": True, "bat": "bat", "mini": "mini"}  # PEFT's init_weights, which says the form


def save_peft(attached: AttachedBone, directory: Path | str, peft_type: str = "MISS") -> Path:
    """Write an adapter as a PEFT directory: MISS (0.17 and later) or BONE (0.14 to 0.18).

    The scale is folded into the blocks; fields that a loaded directory had are kept.

    Raises
    ------
    ConfigError
        For what PEFT has no form for, naming what does: other variants, experts, several ranks; for a
        weight-guided form over another adapter, without which it would be another change.
    FileError
        When the directory cannot be written.
    """
    if peft_type not in KEYS:
        raise ConfigError(f"peft_type={peft_type!r} is not allowed: it must be {' or '.join(KEYS)}")
    _refuse_unheard(attached, peft_type)
    _refuse_beneath(attached)
    blocks = {name: layer.block().detach() for name, layer in attached.layers.items()}
    bone = attached.adapter
    fields = {
        **_common(attached, list(blocks)), "peft_type": peft_type, "r": bone.r,
        "init_weights": FORMS[bone.variant],
        **({"mini_r": bone.mini_r or 1, "miss_dropout": bone.dropout} if peft_type == "MISS" else {}),
    }
    return _write(Path(directory), {f"{name}.{KEYS[peft_type]}": b for name, b in blocks.items()}, fields)


def load_peft(model: nn.Module, directory: Path | str, name: str = "default") -> AttachedBone:
    """Attach the adapter of a PEFT directory, MISS or BONE.

    Raises
    ------
    FileError
        For a directory that is missing, torn or of another kind; for blocks that the model has no layer
        for, that lack, or that the configuration does not mean, naming them.
    """
    saved = read_adapter(directory)
    if saved.source not in KEYS:
        raise FileError(f"{directory} is no directory of PEFT: use poise.load_adapter or read_adapter")
    if saved.source == "BONE":
        warnings.warn(f"{directory} is of peft_type BONE, which PEFT reads no more: read as MISS; "
                      f"save_peft writes that", stacklevel=2)
    if not any(bool(b.any()) for b in saved.blocks.values()):
        warnings.warn(f"{directory} holds blocks of zeros only: the adapter changes nothing", stacklevel=2)
    return saved.attach(model, name)


@torch.no_grad()
def export_lora(
    attached: AttachedBone, directory: Path | str, rank: int | None = None
) -> dict[str, float]:
    """Write an adapter as a LoRA of PEFT, for any server of LoRAs, and return each layer's relative error.

    Exact (error 0) for bone, mini and bone_out; of the weight-guided forms `rank` singular directions of
    the change are kept. The error is of the change, in the Frobenius norm.

    Raises
    ------
    ConfigError
        For a weight-guided form without a rank, or folded or merged, since the weight before its change is
        what the LoRA is made from, or over another adapter; for experts.
    """
    if attached.adapter.variant not in ADDED and (attached.gone or attached.folded):
        raise ConfigError(f"{attached.name}: a LoRA of {attached.adapter.variant} is made from the weights "
                          f"without it: {'attach it again' if attached.gone else 'unfold()'} first")
    _refuse_places(attached)
    _refuse_beneath(attached)
    tensors: dict[str, Tensor] = {}
    errors, ranks = {}, {}
    for name, layer in attached.layers.items():
        block = layer.block().detach()
        A, B, errors[name] = to_lora(layer.beneath(), block, attached.adapter.variant, rank)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        ranks[name] = len(A)
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {name: r for name, r in ranks.items() if r != usual}
    fields = {**_common(attached, list(ranks)), "peft_type": "LORA", "r": usual, "lora_alpha": usual,
              "lora_dropout": 0.0, "fan_in_fan_out": False, "rank_pattern": other, "alpha_pattern": other,
              "use_rslora": False, "use_dora": False, "init_lora_weights": True}
    _write(Path(directory), tensors, fields)
    return errors


def _refuse_unheard(attached: AttachedBone, peft_type: str) -> None:
    """Raise `ConfigError` for what a directory of this type cannot say."""
    bone = attached.adapter
    if bone.variant not in FORMS or (peft_type, bone.variant) == ("BONE", "mini"):
        what = "export_lora writes it as a LoRA, " if bone.variant == "bone_out" else ""
        raise ConfigError(f"{peft_type} of PEFT has no form for variant={bone.variant}: "
                          f"{what}poise.save_adapter keeps it as it is")
    if peft_type == "BONE" and bone.dropout:
        raise ConfigError(f"BONE of PEFT has no dropout ({bone.dropout}): write MISS")
    if bone.rank_pattern:
        raise ConfigError(f"{peft_type} of PEFT has one r for all layers: poise.save_adapter keeps "
                          f"rank_pattern")
    _refuse_places(attached)


def _refuse_places(attached: AttachedBone) -> None:
    """Raise `ConfigError` for layers that PEFT does not adapt."""
    mine = {w.name: w for w in weights(attached.model) if w.name in attached.layers}
    for name, w in mine.items():
        if w.role == "expert" and w.index is not None:
            raise ConfigError(f"{name} is an expert, which a directory of PEFT cannot hold: "
                              f"poise.save_adapter can")
        if w.role not in ("linear", "expert") or _is_conv1d(w):
            kind = "Conv1D" if _is_conv1d(w) else w.role
            raise ConfigError(f"{name} is a {kind}, which PEFT's type does not adapt: poise.save_adapter "
                              f"keeps it")


def _refuse_beneath(attached: AttachedBone) -> None:
    """Raise `ConfigError` for a change that depends on what another adapter has made of the weight."""
    if over := attached.over():
        raise ConfigError(f"{attached.name}: the change of {attached.adapter.variant} depends on the "
                          f"weight, which {over[-1]!r} changes before it: the file alone would be another "
                          f"change; merge() {over[-1]!r} and keep that base with the file, or detach() it")


def _is_conv1d(w: Weight) -> bool:
    return hasattr(w.module, "nf")


def _common(attached: AttachedBone, names: list[str]) -> dict[str, Any]:
    """Return the fields that every directory has, those of one that was loaded first."""
    config = getattr(attached.model, "config", None)
    plain = {
        "auto_mapping": None, "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "revision": None, "task_type": None, "bias": "none", "exclude_modules": None,
        "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None,
    }
    theirs = attached.foreign if "peft_type" in attached.foreign else {}
    fields = {**plain, **theirs, "target_modules": sorted(names), "inference_mode": True}
    others = {path for path, _ in attached.model.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for other in others for name in names):
        # PEFT takes a list as endings, which cover more than these layers, and a string as a whole
        fields |= {"target_modules": "|".join(map(re.escape, sorted(names))), "exclude_modules": None,
                   "layers_to_transform": None, "layers_pattern": None}
    return fields


def _write(directory: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Path:
    from safetensors.torch import save

    data = save({f"{PREFIX}{k}": t.contiguous().clone() for k, t in tensors.items()}, {"format": "pt"})
    write_bytes(directory / TENSORS, data)
    write_json(directory / CONFIG, fields)  # last: without it there is no adapter
    return directory
