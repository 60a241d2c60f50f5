"""Companding a model: which weights, which pairs, which path. The one module above both paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from poise_compander.attached import AttachedCompander, Layer
from poise_compander.bounds import Finding, clamped, fitting, look, refuse, rounded_up
from poise_compander.fast import FastCompander
from poise_compander.functions import Function, named
from poise_compander.reference import ReferenceCompander
from poise_compander.scales import Scales
from poise_compander.selection import choose_companded, local, refuse_held, refuse_unfit
from poise_compander.settings import Settings

PATHS: dict[str, type[AttachedCompander]] = {"fast": FastCompander, "reference": ReferenceCompander}


def compand(
    model: nn.Module, settings: Settings, *, adapter: Any = None, name: str = "default",
    target_modules: list[str] | None = None, exclude_modules: list[str] | None = None,
) -> AttachedCompander:
    """Reparameterize the weights of linears, convolutions and experts, in place.

    Parameters
    ----------
    model : nn.Module
    settings : Settings
    adapter : component, optional
        Kept as `adapter` of what is returned; nothing here looks into it.
    name : str
    target_modules, exclude_modules : list of str, optional
        Patterns of layers to take, and to leave alone.

    Raises
    ------
    ConfigError
        When no layer matches, a weight is held already, is of half precision, is not finite, or reaches the
        bound (with "raise"). The model is then as it was.
    """
    function = named(settings.function)
    chosen, coverage = choose_companded(model, target_modules, exclude_modules,
                                        computed=settings.path == "reference")
    for one in chosen:
        refuse_held("compander", one)
        refuse_unfit(one)
    found = {one.name: look(function, local(one.weight), settings.a, one.name) for one in chosen}
    pairs = _pairs(settings, function, found, {one.name: one.weight.dtype for one in chosen})
    with torch.no_grad():  # nothing is changed before every weight is known to fit
        for one in chosen:
            if found[one.name].over and settings.bound_policy == "clamp":
                own = local(one.weight)
                own.copy_(clamped(function, own, settings.a))
    layers = [Layer(one.name, one.homes, pairs[one.name], found[one.name]) for one in chosen]
    return PATHS[settings.path](adapter, settings, model, name, layers, coverage)


def _pairs(settings: Settings, function: Function, found: Mapping[str, Finding],
           dtypes: Mapping[str, torch.dtype]) -> dict[str, Scales]:
    """Return the pair of each weight, with a grown where the policy says so."""
    if settings.bound_policy == "raise":
        refuse(function, settings.a, dict(found))

    def made(names: list[str]) -> Scales:
        largest = max(found[n].largest for n in names)
        grown = settings.bound_policy == "grow" and any(found[n].over for n in names)
        a = rounded_up(fitting(function, largest)) if grown else settings.a
        dtype = torch.float64 if any(dtypes[n] == torch.float64 for n in names) else torch.float32
        return Scales(function, a, settings.b, settings.learn != "none", settings.guard, dtype)

    if settings.learn == "layer":
        return {name: made([name]) for name in found}
    return dict.fromkeys(found, made(list(found)))
