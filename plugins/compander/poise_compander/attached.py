"""The compander on a model: attach, optimize, fold, save, detach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.errors import ConfigError
from poise.files import copy_checked
from poise.walk import Weight, refuse_tied, select
from poise_compander.components import Compander
from poise_compander.optimizer import companded
from poise_compander.parametrization import Psi, within_bound

KINDS = ("linear", "conv")


def attach(options: Compander, model: nn.Module, name: str) -> AttachedCompander:
    """Reparameterize the weights of linears and convolutions; see `Compander.attach`."""
    chosen = select(model, None, options.exclude or None, KINDS)
    refuse_tied(chosen, "compander")
    if held := [w.name for w in chosen if parametrize.is_parametrized(w.module, "weight")]:
        raise ConfigError(f"compander: {held[0]} is reparameterized already: detach that first")
    inside = {
        w.name: within_bound(_plain(w).detach(), options.a, w.name, options.bound) for w in chosen
    }
    for w in chosen:  # nothing is changed before every weight is known to fit
        values, moved = inside[w.name]
        if moved:
            _plain(w).data.copy_(values)
        _register(w.module, options)
    return AttachedCompander(options, model, name, chosen, {n: m for n, (_, m) in inside.items()})


def _plain(weight: Weight) -> nn.Parameter:
    return weight.module.get_parameter("weight")


def _register(module: nn.Module, options: Compander) -> None:
    parametrize.register_parametrization(module, "weight", Psi(options.a, options.b))


class AttachedCompander:
    """A compander on a model (reference path).

    Parameters
    ----------
    chosen : list of Weight
        The weights it reparameterizes.
    clamped : dict
        How many entries of each were moved inside the bound at attach.
    """

    def __init__(
        self, options: Compander, model: nn.Module, name: str, chosen: list[Weight],
        clamped: Mapping[str, int],
    ) -> None:
        self.options, self.model, self.name = options, model, name
        self.layers = {w.name: w.module for w in chosen}
        self.clamped = clamped
        self._unfolded: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def folded(self) -> bool:
        """Whether the weights are plain at the moment."""
        return bool(self._unfolded)

    def v(self, name: str) -> nn.Parameter:
        """Return the trained tensor v of a layer."""
        return self.layers[name].parametrizations["weight"].original  # type: ignore[index]

    def psi(self, name: str) -> Psi:
        """Return the parametrization of a layer."""
        return self.layers[name].parametrizations["weight"][0]  # type: ignore[index]

    def trainable(self) -> list[dict[str, Any]]:
        """Return two groups: every v, which no optimizer may decay, and all else."""
        own = [self.v(n) for n in self.layers]
        ids = {id(p) for p in own}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ids]
        groups = [{"params": own, "weight_decay": 0.0}]
        return [*groups, {"params": rest}] if rest else groups

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return the optimizer with L2 on w and, for adaptive rules, the step times Psi'."""
        pairs = [(self.psi(n), self.v(n)) for n in self.layers]
        return companded(cls, self.trainable(), pairs, options)

    def fold(self) -> None:
        """Put w into plain weights, in place."""
        if self.folded:
            return
        for name, layer in self.layers.items():
            v = self.v(name).detach().clone()
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            self._unfolded[name] = (v, layer.weight.detach().clone())  # type: ignore[union-attr]

    def unfold(self) -> None:
        """Reparameterize again; v comes back exactly where w was not changed meanwhile."""
        for name, (v, w) in self._unfolded.items():
            layer = self.layers[name]
            untouched = torch.equal(layer.weight, w)  # type: ignore[arg-type]
            _register(layer, self.options)
            if untouched:
                self.v(name).data.copy_(v)
        self._unfolded = {}

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return a plain checkpoint with w in place of v; the live model is untouched."""
        mark = "parametrizations.weight.original"
        tensors = {}
        live = {f"{path}.".lstrip("."): m for path, m in self.model.named_modules()}
        for key, value in self.model.state_dict().items():
            if key.endswith(mark):
                path = key.removesuffix(mark)
                tensors[f"{path}weight"] = live[path].weight.detach().clone()  # type: ignore[union-attr]
            else:
                tensors[key] = value
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Return every v by layer name, `NAME.v`."""
        return {f"{n}.v": self.v(n).detach() for n in self.layers}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load every v.

        Raises
        ------
        FileError
            When names or shapes differ, naming the first.
        """
        copy_checked(self.state_dict(), tensors, "compander")

    def detach(self) -> nn.Module:
        """Fold for good and return the plain model."""
        self.fold()
        self._unfolded = {}
        return self.model

    def report(self) -> dict[str, Any]:
        """Return counts, what was clamped, and the share of nearly frozen weights."""
        found: dict[str, Any] = {
            "method": "compander", "function": self.options.function,
            "a": self.options.a, "b": self.options.b,
            "effective_lr_factor": (self.options.a / self.options.b) ** 2,
            "layers": len(self.layers), "clamped": sum(self.clamped.values()),
        }
        if not self.folded:
            found["saturated_share"] = self._saturated()
        return found

    def _saturated(self) -> float:
        """Return the share of weights whose Psi' is below a tenth of its largest value."""
        low = total = 0
        for name in self.layers:
            slope = self.psi(name).derivative(self.v(name).detach())
            low += int((slope < 0.1 * self.options.a / self.options.b).sum())
            total += slope.numel()
        return low / total
