"""Quantize a whole model, uniformly or under a plan, and count its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from poise.errors import ConfigError, DataError, nearest
from poise.holding import tensor_of, who_holds
from poise.quantizers.layers import PackedLinear
from poise.walk import Weight, covered, has_own_forward, named_tie, weights
from poise.walk.experts import ExpertSlot, PlainExpert
from poise.walk.plain import computed

ROLES = ("linear", "expert")  # what is packed without being named
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
        plan every linear and expert that a layer can stand in for is quantized, except tied ones.

    Returns
    -------
    dict
        `quantized` (name to bits per weight), `kept` (names), `bytes_before`, `bytes_after`.

    Raises
    ------
    ConfigError
        For a name that matches no weight, bits out of range, a tied weight in a plan, or a weight that an
        adapter acts on.
    DataError
        Naming the weight that holds NaN or Inf; the model is then unchanged.
    """
    before = stored_bytes(model)["total"]
    found = list(weights(model))
    _refuse_adapted(found)
    chosen = resolve(found, quantizer, plan)
    for w, _ in chosen:
        _refuse_wrapped(w)
    packed = [(w, _quantize(w, q), q) for w, q in chosen]
    _place(packed)
    names = {w.name for w, _, _ in packed}
    return {
        "quantized": {w.name: stored.bits_per_weight for w, stored, _ in packed},
        "kept": [w.name for w in weights(model) if w.name not in names],
        "bytes_before": before, "bytes_after": stored_bytes(model)["total"],
    }


def _refuse_adapted(found: list[Weight]) -> None:
    """Raise `ConfigError` for a model with an adapter: it would go on with layers that are gone."""
    for w in found:
        if who := w.adapters[0] if w.adapters else who_holds(tensor_of(w)):
            raise ConfigError(f"{w.name} is adapted by {who!r}: quantize the model before attach, or after "
                              f"merge()")
        if w.module is not None and w.parameter in computed(w.module):
            raise ConfigError(f"{w.name} is reparameterized: quantize before that, or after merge()")


def _refuse_wrapped(w: Weight) -> None:
    """Raise `ConfigError` where a packed layer would drop what acts around the plain one."""
    layer = w.layer
    if w.lies_in:
        raise ConfigError(f"{w.name} lies in {w.lies_in}, in the bits that it was written with: leave it "
                          f"out of the plan, or convert the model anew")
    if isinstance(w.slot, ExpertSlot):
        if foreign := w.slot.foreign():
            raise ConfigError(f"{w.name}: {foreign} stands in for an expert of its block: undo that first")
    elif layer is not w.module:
        raise ConfigError(f"{w.name}: {type(layer).__name__} stands in its place: undo that first")
    if has_own_forward(layer):
        raise ConfigError(f"{w.name} has forward hooks, or a forward of its own, which a packed layer "
                          f"would drop: remove them first, or leave it out of the plan")


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Return bytes held in packed weights, in all else, and in total; shared tensors count once."""
    packed = sum(w.stored.nbytes for w in weights(model) if w.stored is not None)
    plain = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"packed": packed, "plain": plain, "total": packed + plain}


def resolve(
    found: Iterable[Weight], quantizer: Any, plan: Mapping[str, Any] | None = None
) -> list[tuple[Weight, Any]]:
    """Say which weights are quantized, and by what; needs no live model (`poise.open_weights`).

    Parameters
    ----------
    found : weights of one model
    quantizer, plan
        As for `quantize_model`.

    Raises
    ------
    ConfigError
        For a line that matches no weight, means no quantizer, or names a weight that cannot be packed.
    """
    everything = list(found)
    found = [w for w in everything if w.role in (*ROLES, "router")]
    if plan is None:
        return [(w, quantizer) for w in found if not _only_if_named(w) and not w.tied_layers]
    if not isinstance(plan, Mapping) or not all(isinstance(pattern, str) for pattern in plan):
        raise ConfigError(f"a plan is a mapping of names or patterns to bits or quantizers, not {plan!r}")
    by_name: dict[str, Any] = {}
    names = [w.name for w in found]
    for pattern, value in plan.items():
        hits = [pattern] if pattern in names else [w.name for w in covered(found, pattern, _only_if_named)]
        if not hits and (hit := named_tie(everything, pattern)):
            raise ConfigError(f"plan: {hit[0]} is tied with {hit[1].name}: leave it out")
        if not hits:
            raise ConfigError(f"plan: {pattern!r} matches no weight{nearest(pattern, names)}")
        by_name.update(dict.fromkeys(hits, value))
    chosen = []
    for w in found:
        if w.name in by_name and (q := _quantizer(quantizer, w.name, by_name[w.name])) is not None:
            _refuse(w)
            chosen.append((w, q))
    return chosen


def _only_if_named(w: Weight) -> bool:
    return w.role == "router" or not w.replaceable


def _refuse(w: Weight) -> None:
    if w.tied_layers:
        raise ConfigError(f"plan: {w.name} is tied with {', '.join(w.tied_layers)}: leave it out")
    if not w.replaceable:
        raise ConfigError(f"plan: {w.name} takes part in its module's own arithmetic, which a packed layer "
                          f"cannot: leave it out")


def _quantizer(default: Any, name: str, value: Any) -> Any:
    """Return the quantizer that a line of a plan means; None: leave the weight as it is."""
    from poise.registry import installed

    if isinstance(value, Mapping):
        if not isinstance(value.get("entry"), str):
            raise ConfigError(f"plan: {name}: {dict(value)!r} has no entry (absmax, affine, ...)")
        return installed().build_from("quantizer", dict(value))
    if hasattr(value, "quantize") and not isinstance(value, type):
        return value
    if value in FULL:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"plan: {name}: {value!r} is neither bits nor a quantizer")
    try:
        return default.at(value)
    except ConfigError as error:
        raise ConfigError(f"plan: {name}: {error}, or 16 to leave it as it is") from None


def _quantize(weight: Weight, quantizer: Any) -> Any:
    try:
        return quantizer.quantize(weight.read())
    except DataError as error:
        raise DataError(f"weight {weight.name} {error}") from None


def _place(packed: list[tuple[Weight, Any, Any]]) -> None:
    fused = {}
    for w, stored, quantizer in packed:
        assert w.slot is not None
        replaced = w.layer
        bias = getattr(replaced, "bias", None)
        if isinstance(w.slot, ExpertSlot):
            experts = w.slot.experts()
            fused[id(experts)] = experts
            replaced = PlainExpert(w.plain(w.read()), experts.transposed)
        elif isinstance(replaced, PackedLinear):  # packed before: the plain layer is the same
            replaced = replaced.like
        elif w.stored is not None:  # another library's: the plain layer is an ordinary one
            replaced = None
        # one that only chose the scales of another's form is not needed again
        layer = PackedLinear(stored, getattr(quantizer, "plain", quantizer), bias, replaced)
        for slot in w.slots:
            slot.put(layer)
    for experts in fused.values():
        experts.unfuse()
