"""The reference path: torch's parametrize computes w = Psi(v) at every use."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.errors import ConfigError, FileError, RunError
from poise_compander.attached import AttachedCompander, Layer
from poise_compander.bounds import below, beyond
from poise_compander.components import WeightCompander
from poise_compander.scales import Scales

_MARK = "parametrizations.weight.original"


class Psi(nn.Module):
    """The parametrization w = Psi(v), and its exact inverse."""

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales
        self.given = _Given()

    def forward(self, v: Tensor) -> Tensor:
        """Return w, same shape as v."""
        w = self.scales.function.forward(v, self.scales.a, self.scales.b)
        if not torch.compiler.is_compiling():
            self.given.remember(w)
        return w

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return v with Psi(v) = w.

        Raises
        ------
        ConfigError
            When a weight is over the bound, where there is no v.
        """
        a, b = self.scales.numbers()
        if fault := beyond(self.scales.function, w, a, "the layer"):
            raise ConfigError(f"compander: {fault}")
        return self.scales.function.inverse(below(self.scales.function, w, a), a, b)

    def derivative(self, v: Tensor) -> Tensor:
        """Return Psi'(v), same shape as v."""
        return self.scales.function.derivative(v, self.scales.a, self.scales.b)


class _Given:
    """The last w that a layer was given: a write to it, which nothing would keep, shows in its version."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, int] | None = None

    def remember(self, w: Tensor) -> None:
        self.check()
        seen = w.detach()  # shares the version counter, not the graph
        self.last = seen, seen._version

    def check(self) -> None:
        if self.last is not None and self.last[0]._version != self.last[1]:
            self.last = None
            raise RunError("compander: the weight of a companded layer was written to in place; on the "
                           "reference path such a write is lost, since w is computed from v at every use: "
                           "assign it (layer.weight = tensor), or initialise before attach")

    def __deepcopy__(self, memo: dict) -> _Given:
        return _Given()

    def __reduce__(self) -> Any:
        return _Given, ()


class ReferenceCompander(AttachedCompander):
    """A compander by parametrizations; `layer.weight` is computed, and v is what the model holds."""

    def __init__(
        self, options: WeightCompander, model: nn.Module, name: str, companded: list[Layer]
    ) -> None:
        self._unfolded: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in companded:
            _register(layer)
        super().__init__(options, model, name, companded)
        self._hook = model.register_load_state_dict_pre_hook(self._take_plain)

    def parameter(self, name: str) -> nn.Parameter:
        return self.companded[name].module.parametrizations["weight"].original  # type: ignore[index]

    def v(self, name: str) -> Tensor:
        return self._unfolded[name][0] if self.folded else self.parameter(name)

    def w(self, name: str) -> Tensor:
        with torch.no_grad():
            return self.companded[name].module.weight.detach()  # type: ignore[union-attr]

    def psi(self, name: str) -> Psi:
        """Return the parametrization of a layer."""
        return self.companded[name].module.parametrizations["weight"][0]  # type: ignore[index]

    def cached(self) -> contextlib.AbstractContextManager:
        return parametrize.cached()

    def check_untouched(self) -> None:
        if not self.folded:
            for name in self.companded:
                self.psi(name).given.check()

    def fold(self) -> None:
        if self.folded:
            return
        with torch.no_grad():
            for name, layer in self.companded.items():
                v = self.v(name).detach().clone()
                for holder in layer.holders:
                    _fold(holder, layer, v)
                self._unfolded[name] = v, layer.module.weight.detach().clone()  # type: ignore[union-attr]
        self.folded = True

    def unfold(self) -> None:
        super().unfold()
        if not self.folded:
            return
        for name, (v, w) in self._unfolded.items():
            layer = self.companded[name]
            untouched = torch.equal(layer.module.weight, w)  # type: ignore[arg-type]
            _register(layer)
            if untouched:
                self.parameter(name).data.copy_(v)
        self._unfolded, self.folded = {}, False

    def folded_state_dict(self) -> dict[str, Tensor]:
        return folded_state_dict(self.model)

    def _take_plain(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Let a plain checkpoint load: `X.weight` becomes v where the model has `X` companded."""
        for path, held in module.named_modules(remove_duplicate=False):
            where = f"{prefix}{path}.".lstrip(".")
            plain = state_dict.get(f"{where}weight")
            if plain is None or not parametrize.is_parametrized(held, "weight"):
                continue
            psi = held.parametrizations["weight"][0]  # type: ignore[index]
            if isinstance(psi, Psi):
                if fault := beyond(psi.scales.function, plain, psi.scales.numbers()[0], path):
                    raise FileError(f"compander: {fault}; none of its weights was loaded")
                del state_dict[f"{where}weight"]
                state_dict[f"{where}{_MARK}"] = psi.right_inverse(plain)
                for key, value in psi.state_dict().items():
                    state_dict.setdefault(f"{where}parametrizations.weight.0.{key}", value)

    def detach(self) -> nn.Module:
        self._hook.remove()
        return super().detach()


def folded_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's checkpoint, with weights in place of what they are computed from."""
    tensors: dict[str, Tensor] = {}
    live = {f"{path}.".lstrip("."): m for path, m in model.named_modules(remove_duplicate=False)}
    for key, value in model.state_dict().items():
        path, mark, _ = key.partition("parametrizations.weight.")
        if not mark or path not in live:
            tensors[key] = value.clone()
        elif f"{path}weight" not in tensors:
            with torch.no_grad():
                tensors[f"{path}weight"] = live[path].weight.detach().clone()  # type: ignore[union-attr]
    return tensors


def _register(layer: Layer) -> None:
    """Parametrize every holder of a weight by the same v."""
    plain = layer.module.weight.detach().clone()  # type: ignore[union-attr]
    for holder in layer.holders:
        holder.get_parameter("weight").data.copy_(plain)  # the holder before has put v there
        parametrize.register_parametrization(holder, "weight", Psi(layer.scales))


def _fold(holder: nn.Module, layer: Layer, v: Tensor) -> None:
    holder.parametrizations["weight"].original.data.copy_(v)  # type: ignore[index]
    parametrize.remove_parametrizations(holder, "weight", leave_parametrized=True)
