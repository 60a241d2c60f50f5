"""Which weights a method takes, and which it cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.holding import refuse_frozen, who_holds
from poise.walk import Weight, choose, matches, refuse_overlap, weights
from poise_compander.coverage import ASKED, Coverage
from poise_compander.plain import Home

_ROLES = ("linear", "conv", "expert")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Chosen:
    """A parameter that a method takes whole, while it is plain; several modules hold one that is tied."""

    name: str
    homes: list[Home]
    tied_with: tuple[str, ...]
    adapters: tuple[str, ...]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that all homes share."""
        return self.homes[0].plain


def choose_companded(
    model: nn.Module, target_modules: list[str] | None, exclude_modules: list[str] | None, *,
    computed: bool = False,
) -> tuple[list[Chosen], Coverage]:
    """Return the weights of linears, convolutions and experts, and of embeddings where an output layer
    shares them; and what share of the model they are.

    Parameters
    ----------
    computed : bool
        Leave out what torch's parametrize cannot compute: the matrices of its LSTM, GRU and RNN.

    Raises
    ------
    ConfigError
        When a pattern, or the whole selection, matches nothing, with candidates; for some experts of one
        parameter without the others.
    """
    modules = dict(model.named_modules(remove_duplicate=False))

    def why_not(w: Weight) -> str | None:
        shared = any(isinstance(modules.get(tie), nn.Linear) for tie in w.tied_with)
        if w.role == "embedding" and not shared:
            return "embeddings"
        if computed and isinstance(w.module, nn.RNNBase):
            return "path='reference' cannot compute a matrix of torch's LSTM, GRU or RNN: path='fast' can"
        return _why_not(w, (*_ROLES, "embedding"))

    return _choose(model, modules, target_modules, exclude_modules, why_not)


def choose_layers(
    model: nn.Module, target_modules: list[str] | None, exclude_modules: list[str] | None
) -> tuple[list[Chosen], Coverage]:
    """Return the weights of linears and convolutions that have one of their own, and what share of the
    model they are; raises `ConfigError` as `choose_companded` does."""

    def why_not(w: Weight) -> str | None:
        if w.stored is None and w.role in _ROLES and w.parameter != "weight":
            return "matrices that share a module: an expert's, attention's inner ones, an LSTM's"
        return _why_not(w, _ROLES)

    modules = dict(model.named_modules(remove_duplicate=False))
    return _choose(model, modules, target_modules, exclude_modules, why_not)


def _why_not(w: Weight, roles: tuple[str, ...]) -> str | None:
    """Return why a weight cannot be taken; None where it can."""
    if w.stored is not None:
        return "packed weights"
    if w.role not in (*roles, "router"):
        return f"{w.role}s" if w.role == "embedding" else "neither linears, convolutions nor experts"
    held = getattr(w.module, w.parameter, None)
    return None if isinstance(held, Tensor) else "experts that are held apart"


def _choose(
    model: nn.Module, modules: dict[str, nn.Module], include: list[str] | None, exclude: list[str] | None,
    why_not: Callable[[Weight], str | None],
) -> tuple[list[Chosen], Coverage]:
    everything = [w for w in weights(model) if w.numel]
    reasons = {id(w): why_not(w) for w in everything}
    fit = [w for w in everything if reasons[id(w)] is None]
    for pattern in include or []:
        named = [w for w in everything if matches(w.name, pattern)]
        if named and all(reasons[id(w)] for w in named):
            raise ConfigError(f"{named[0].name} is named and cannot be taken: {reasons[id(named[0])]}")
    if not fit:
        why = Counter(reasons[id(w)] or "" for w in everything)
        found = ", ".join(f"{reason} ({n})" for reason, n in why.items())
        raise ConfigError(f"no weight can be taken: {f'the model has {found}' if why else 'it has none'}")
    taken = choose(fit, include, exclude, (*_ROLES, "embedding"))
    for w in taken:
        refuse_overlap(w, "compander")
    mine = {id(w) for w in taken}
    for w in fit:
        if id(w) not in mine:
            unnamed = include is None and w.role == "router"
            reasons[id(w)] = "routers, unless named" if unnamed else ASKED
    left = [(w.name, w.numel, reason) for w in everything if (reason := reasons[id(w)])]
    return _whole(taken, fit, modules), Coverage(sum(w.numel for w in taken), left)


def _whole(taken: list[Weight], fit: list[Weight], modules: dict[str, nn.Module]) -> list[Chosen]:
    """Return the parameters that the weights lie in: the experts of one are taken together."""
    there = Counter(_name(w) for w in fit)
    found: dict[str, list[Weight]] = {}
    for w in taken:
        found.setdefault(_name(w), []).append(w)
    for name, parts in found.items():
        if len(parts) < there[name]:
            raise ConfigError(f"compander: {len(parts)} of the {there[name]} experts of {name} are named, "
                              f"and they are one parameter: name them all, or none")
    return [_with_homes(name, parts[0], modules) for name, parts in found.items()]


def _name(w: Weight) -> str:
    """Return the name of the parameter that a weight lies in; of a layer's only one, the layer's."""
    return w.name if w.index is None else w.state_key


def _with_homes(name: str, w: Weight, modules: dict[str, nn.Module]) -> Chosen:
    assert w.module is not None
    homes = [Home(w.module, w.parameter), *(_home(tie, w, modules) for tie in w.tied_with)]
    distinct = {(id(home.module), home.parameter): home for home in homes}
    return Chosen(name, list(distinct.values()), w.tied_with, w.adapters)


def _home(tie: str, w: Weight, modules: dict[str, nn.Module]) -> Home:
    """Return where another name of a weight stands."""
    if w.index is not None:  # experts.3.gate_up: the parameter's path is two parts shorter
        return Home(modules[tie.rsplit(".", 2)[0]], w.parameter)
    if tie in modules:
        return Home(modules[tie])
    path, _, parameter = tie.rpartition(".")
    return Home(modules[path], parameter)


def refuse_held(what: str, one: Chosen) -> None:
    """Raise `ConfigError` for a weight that something reparameterizes already; `what` asks."""
    if one.adapters:
        raise ConfigError(f"{what}: {one.name} is adapted by {one.adapters[0]!r}: call merge() or detach() "
                          f"on that first")
    refuse_frozen([] if one.homes[0].is_computed else [one.weight], what)
    for home in one.homes:
        if home.is_computed:
            raise ConfigError(f"{what}: {one.name} is reparameterized already: detach that first")
        if who := who_holds(home.plain):
            done = "companded" if who == "compander" else f"held by {who}"
            raise ConfigError(f"{what}: {one.name} is {done} already: call detach() on what attach "
                              f"returned before")


def refuse_unfit(one: Chosen) -> None:
    """Raise `ConfigError` for a weight that cannot be companded."""
    name, weight = one.name, one.weight
    if not _dense(local(weight)):
        raise ConfigError(f"compander: {name} is a part of a larger tensor (strides {weight.stride()}): "
                          f"give the layer a weight of its own, nn.Parameter(weight.clone())")
    if not weight.is_floating_point():
        raise ConfigError(f"compander: {name} is {weight.dtype}: it takes real numbers; exclude it")
    if weight.dtype in _HALF:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ConfigError(f"compander: {name} is {kind}: v needs more digits near the bound; keep weights "
                          f"in float32 (model.float()) and train under autocast")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or the tensor; a view without gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory without gaps, in any order of axes."""
    sizes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    expected = 1
    for stride, size in sizes:
        if stride != expected:
            return False
        expected *= size
    return True
