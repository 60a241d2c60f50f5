"""Choose the weights that an adapter of layers takes, and put its layers there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from poise.adapters.attached import AttachedLayers, ReparameterizedLayers
from poise.adapters.layer import AdaptedLayer, adapter_parameters
from poise.errors import ConfigError
from poise.holding import refuse_frozen, refuse_held, refuse_name, refuse_trained, tensor_of
from poise.walk import Weight, choose, has_own_forward, named_tie, refuse_tied, untied, weights


def choose_layers(
    model: nn.Module, what: str, target_modules: list[str] | None, exclude_modules: list[str] | None,
    roles: tuple[str, ...] = ("linear",), *, if_named: tuple[str, ...] = (),
) -> list[Weight]:
    """Choose the weights that an adapter of layers takes.

    Parameters
    ----------
    what : str
        The adapter's name, for messages.
    target_modules : list of str or None
        Patterns of weights; None: every one of these roles but a language model's head and routers.
    if_named : tuple of str
        Roles besides that are taken where a pattern names them and nothing else; routers are.

    Raises
    ------
    ConfigError
        When nothing matches, or a weight that is named is tied, held by another adapter, or part of its
        module's own arithmetic.
    """
    if torch.is_inference_mode_enabled():
        raise ConfigError(f"{what}: what is made in torch.inference_mode() cannot train: attach outside it")
    found = list(weights(model))
    for pattern in target_modules or ():
        if hit := named_tie(found, pattern):
            raise ConfigError(f"{what}: {untied(*hit)}")
    chosen = choose(found, target_modules, exclude_modules, roles, replaceable=True,
                    if_named=("router", *if_named))
    heads = _heads(model)
    if target_modules is None:  # the output head stays as it is unless it is asked for
        chosen = [w for w in chosen if not _is_head(w, heads)]
        if not chosen:
            raise ConfigError(f"{what}: no linear layer to adapt (the head is adapted only when named)")
    refuse_tied(chosen, what)
    refuse_held(chosen, what)
    for w in chosen:
        _refuse_wrapped(w, what)
        _refuse_tied_again(w, heads, what)
    return chosen


def _heads(model: nn.Module) -> dict[int, bool]:
    """Return the ids of the layers that transformers' models at or below a module call their output, and
    whether a reload of their configuration ties each to the input embedding."""
    found = {}
    for m in model.modules():
        ask: Any = getattr(m, "get_output_embeddings", None)
        if callable(ask) and (head := ask()) is not None:
            said = getattr(getattr(m, "config", None), "tie_word_embeddings", False)
            found[id(head)] = bool(said and getattr(m, "_tied_weights_keys", None))
    return found


def _is_head(w: Weight, heads: Mapping[int, bool]) -> bool:
    return id(_made(w)) in heads or w.name.rpartition(".")[2] == "lm_head"


def _made(w: Weight) -> Any:
    return w.slot.get() if w.slot is not None else w.module


def _refuse_tied_again(w: Weight, heads: Mapping[int, bool], what: str) -> None:
    """Raise `ConfigError` for a head of its own weight whose configuration says that it has none."""
    if heads.get(id(_made(w))):
        raise ConfigError(f"{what}: {w.name} has a weight of its own, and the model's configuration says "
                          f"that it is tied, which a reload would follow: set config.tie_word_embeddings = "
                          f"False")


def _refuse_wrapped(w: Weight, what: str) -> None:
    """Raise `ConfigError` for a layer whose product is not that of its weight alone: an adapter's change,
    and its fold, would be something else there."""
    if has_own_forward(w.layer):
        raise ConfigError(f"{what}: {w.name} has forward hooks, or a forward of its own: remove them "
                          f"first, or exclude it")


def attach_layers(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], chosen: list[Weight], *, adapter: Any, name: str,
    cls: type[AttachedLayers] | None = None,
) -> Any:
    """Put a layer before each chosen weight, freeze all else, and return what is attached.

    Parameters
    ----------
    layers : mapping of weight name to layer, each made around `Weight.layer`
    adapter : component
        Whose options these are.
    name : str
        Of this adapter on this model.
    cls : type, optional
        A subclass of `AttachedLayers`, for a method with a report of its own.

    Raises
    ------
    ConfigError
        When the model has an adapter of this name.
    """
    refuse_name(model, name, names_on(model))
    if not adapter.freezes_base:
        _refuse_shared(chosen, name)
    theirs = adapter_parameters(model)
    base = [p for p in model.parameters() if id(p) not in theirs] if adapter.freezes_base else []
    refuse_trained(base, name)
    slots = {}
    for w in chosen:
        layers[w.name].adapter, layers[w.name].place = name, w.name
        layers[w.name].train((w.module or model).training)  # a new module is in training mode
        assert w.slot is not None
        w.slot.put(layers[w.name])
        slots[w.name] = w.slot
    made = cls or (AttachedLayers if adapter.freezes_base else ReparameterizedLayers)
    return made(adapter, model, name, dict(layers), slots, base)


def _refuse_shared(chosen: list[Weight], name: str) -> None:
    """Raise `ConfigError` for a weight that an adapter whose base trains cannot have to itself."""
    refuse_frozen((t for w in chosen if isinstance(t := tensor_of(w), nn.Parameter)), name)
    for w in chosen:
        if w.adapters:
            raise ConfigError(f"{name}: {w.name} is adapted by {w.adapters[0]!r}, and this adapter holds "
                              f"its weights alone: call merge() or detach() on that first")
        if w.stored is not None or w.lies_in:
            how = f"lies in {w.lies_in}" if w.lies_in else "is packed"
            raise ConfigError(f"{name}: {w.name} {how} and cannot train: exclude it, or take an "
                              f"adapter that freezes its base")


def names_on(model: nn.Module) -> list[str]:
    """Return the names of the adapters on a model, in the order in which they act on a weight."""
    found = {}
    for w in weights(model):
        found |= dict.fromkeys(w.adapters)
    return list(found)
