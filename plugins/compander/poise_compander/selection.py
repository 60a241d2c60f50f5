"""Which weights a method takes, and which it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.errors import ConfigError
from poise.holding import refuse_frozen, who_holds
from poise.walk import Weight, choose, weights

_ROLES = ("linear", "conv", "expert")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Chosen:
    """A weight that a method takes, while it is plain; several modules hold one that is tied."""

    name: str
    holders: list[nn.Module]
    tied_with: tuple[str, ...]
    adapters: tuple[str, ...]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that all holders share."""
        return self.holders[0].get_parameter("weight")


def choose_companded(
    model: nn.Module, target_modules: list[str] | None, exclude_modules: list[str] | None
) -> list[Chosen]:
    """Return the weights of linears and convolutions, and of embeddings where an output layer shares them.

    Raises
    ------
    ConfigError
        When a pattern, or the whole selection, matches nothing; with candidates.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = [
        w for w in _plain(model, target_modules, exclude_modules, (*_ROLES, "embedding"))
        if w.role != "embedding" or any(isinstance(modules.get(tie), nn.Linear) for tie in w.tied_with)
    ]
    if not chosen:
        raise ConfigError("compander: the layers that are named are embeddings, or empty; it takes linears "
                          "and convolutions")
    return [_with_holders(w, modules) for w in chosen]


def choose_layers(
    model: nn.Module, target_modules: list[str] | None, exclude_modules: list[str] | None
) -> list[Chosen]:
    """Return the weights of linears and convolutions; raises `ConfigError` as `choose_companded` does."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [_with_holders(w, modules) 
            for w in _plain(model, target_modules, exclude_modules, _ROLES)]


def _plain(
    model: nn.Module, include: list[str] | None, exclude: list[str] | None, roles: tuple[str, ...]
) -> list[Weight]:
    """Choose among the weights that are a plain parameter called `weight`: neither packed nor one of an
    LSTM's or of fused experts."""
    found = [w for w in weights(model) if w.parameter == "weight" and w.stored is None and w.numel]
    return choose(found, include, exclude, roles)


def _with_holders(w: Weight, modules: dict[str, nn.Module]) -> Chosen:
    holders = [w.module, *(modules[tie] for tie in w.tied_with if tie in modules)]
    return Chosen(w.name, list({id(m): m for m in holders}.values()), w.tied_with, w.adapters)


def refuse_held(what: str, one: Chosen) -> None:
    """Raise `ConfigError` for a weight that something reparameterizes already; `what` asks."""
    if one.adapters:
        raise ConfigError(f"{what}: {one.name} is adapted by {one.adapters[0]!r}: call merge() or detach() "
                          f"on that first")
    refuse_frozen([one.weight] if not parametrize.is_parametrized(one.holders[0], "weight") else [], what)
    for module in one.holders:
        if parametrize.is_parametrized(module, "weight"):
            raise ConfigError(f"{what}: {one.name} is reparameterized already: detach that first")
        if who := who_holds(module.get_parameter("weight")):
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
