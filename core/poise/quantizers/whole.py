"""Quantize a whole model, uniformly or under a plan, and count its bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from poise.errors import ConfigError, DataError, nearest
from poise.quantizers.layers import PackedExperts, PackedLinear
from poise.walk import Weight, experts_are_transposed, matches, path_of, replace_module, weights

KINDS = ("linear", "conv1d", "expert")
FULL = (16, 32)  # bits in a plan that mean: leave it as it is


def quantize_model(
    model: nn.Module, quantizer: Any, plan: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Replace linears and experts by packed ones, in place.

    Parameters
    ----------
    model : nn.Module
    quantizer : Quantizer
        Used where the plan gives only bits, and everywhere when there is no plan.
    plan : mapping of name or pattern to bits, quantizer, or {"entry": name, ...}
        Later lines win; 16 or 32 leaves a weight as it is, and so does not naming it. Without a
        plan every linear and expert is quantized, except tied ones.

    Returns
    -------
    dict
        `quantized` (name to bits per weight), `kept` (names), `bytes_before`, `bytes_after`.

    Raises
    ------
    ConfigError
        For a name that matches no weight, bits out of range, or a tied weight in a plan.
    DataError
        Naming the weight that holds NaN or Inf; the model is then unchanged.
    """
    before = stored_bytes(model)["total"]
    found = [w for w in weights(model) if w.kind in KINDS]
    chosen = _choose(found, quantizer, plan)
    packed = {w.name: (_quantize(w, q), q) for w, q in chosen}
    _place(model, found, packed)
    return {
        "quantized": {n: s.bits_per_weight for n, (s, _) in packed.items()},
        "kept": [w.name for w in weights(model) if w.name not in packed],
        "bytes_before": before, "bytes_after": stored_bytes(model)["total"],
    }


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Return bytes held in packed weights, in all else, and in total; shared tensors count once."""
    packed = sum(
        stored().nbytes
        for module in model.modules() if isinstance(module, (PackedLinear, PackedExperts))
        for _, _, stored in module.packed_weights("") if hasattr(stored(), "bits_per_weight")
    )
    plain = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"packed": packed, "plain": plain, "total": packed + plain}


def _choose(
    found: list[Weight], quantizer: Any, plan: Mapping[str, Any] | None
) -> list[tuple[Weight, Any]]:
    if plan is None:
        return [(w, quantizer) for w in found if not w.tied_with]
    by_name: dict[str, Any] = {}
    names = [w.name for w in found]
    for pattern, value in plan.items():
        hits = [n for n in names if n == pattern or matches(n, pattern)]
        if not hits:
            raise ConfigError(f"plan: {pattern!r} matches no weight{nearest(pattern, names)}")
        by_name.update(dict.fromkeys(hits, value))
    chosen = []
    for w in found:
        if w.name in by_name and (q := _quantizer(quantizer, w.name, by_name[w.name])) is not None:
            if w.tied_with:
                raise ConfigError(f"plan: {w.name} is tied with {', '.join(w.tied_with)}: leave it out")
            chosen.append((w, q))
    return chosen


def _quantizer(default: Any, name: str, value: Any) -> Any:
    """Return the quantizer that a line of a plan means; None: leave the weight as it is."""
    from poise.registry import installed

    if isinstance(value, Mapping):
        return installed().build_from("quantizer", dict(value))
    if hasattr(value, "quantize"):
        return value
    if value in FULL and not isinstance(value, bool):
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"plan: {name}: {value!r} is neither bits nor a quantizer")
    try:
        return dataclasses.replace(default, bits=value)
    except ConfigError as error:
        raise ConfigError(f"plan: {name}: {error}, or 16 to leave it as it is") from None


def _quantize(weight: Weight, quantizer: Any) -> Any:
    try:
        return quantizer.quantize(weight.read())
    except DataError as error:
        raise DataError(f"weight {weight.name} {error}") from None


def _place(model: nn.Module, found: list[Weight], packed: Mapping[str, tuple[Any, Any]]) -> None:
    fused: dict[tuple[int, str], list[Weight]] = {}
    for w in found:
        if w.kind == "expert":
            fused.setdefault((id(w.module), w.parameter), []).append(w)
        elif w.name in packed:
            bias = getattr(w.module, "bias", None)
            layer = PackedLinear(*packed[w.name], bias, transposed=w.kind == "conv1d")
            replace_module(model, path_of(model, w.module), layer)
    for group in fused.values():
        if any(w.name in packed for w in group):
            _place_experts(model, group, packed)


def _place_experts(model: nn.Module, group: list[Weight], packed: Mapping[str, Any]) -> None:
    module, name = group[0].module, group[0].parameter
    if isinstance(module, PackedExperts):  # some experts were packed before, these were not
        for w in group:
            if w.name in packed and w.index is not None:
                module.pack(w.index, *packed[w.name])
        return
    tensor = getattr(module, name)
    experts = [packed[w.name] if w.name in packed else tensor[w.index].detach() for w in group]
    delattr(module, name)
    setattr(module, name, PackedExperts(experts, name, experts_are_transposed(module)))
    # fused kernels need the 3-D tensor; the plain loop over experts asks for one matrix at a time
    for part in model.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the checkpoint that the model would have with every packed weight dequantized."""
    import torch

    owned: dict[str, Any] = {}
    packed_paths = []
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            packed_paths.append(f"{path}.")
            dense = module.packed.get().dequantize()
            owned[f"{path}.weight"] = dense.T.contiguous() if module.transposed else dense
            if module.bias is not None:
                owned[f"{path}.bias"] = module.bias.detach()
        elif isinstance(module, PackedExperts):
            packed_paths.append(f"{path}.")
            rows = [get() for _, _, get in module.packed_weights(path)]
            whole = [r.detach() if isinstance(r, torch.Tensor) else r.dequantize() for r in rows]
            owned[path] = torch.stack([m.T if module.transposed else m for m in whole])
    plain = {
        k: v for k, v in model.state_dict().items() if not k.startswith(tuple(packed_paths))
    } if packed_paths else model.state_dict()
    return {**plain, **owned}
