"""Experts that live in one fused 3-D parameter: each its own weight, and its own place for a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, ValuesView
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.walk.families import TRANSPOSED, part_name
from poise.walk.plain import joined, reader, tensor_key
from poise.walk.product import Product, operands
from poise.walk.weight import Expert, Weight

_BATCHED = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)


def are_transposed(module: nn.Module) -> bool:
    """Tell whether a fused parameter is (experts, in, out): transformers marks most such modules."""
    named = any(cls.__name__ in TRANSPOSED for cls in type(module).__mro__)
    return named or bool(getattr(module, "is_transposed", False))


def fused_weights(module: nn.Module, path: str, parameter: str) -> Iterator[Weight]:
    """Yield every expert of a fused parameter that no layer has replaced yet.

    Parameters
    ----------
    path : str
        Of the module that holds the parameter, `...mlp.experts`.
    """
    for number in range(getattr(module, parameter).shape[0]):
        yield _fused(module, path, parameter, number)


def _fused(module: nn.Module, path: str, parameter: str, number: int) -> Weight:
    layer = FusedExpert(module, parameter, number)
    one, part = layer.matrix, part_name(parameter)
    return Weight(
        joined(path, str(number), part), "expert", (one.shape[0], one.shape[1]), one.dtype,
        joined(path, parameter), module, parameter, (*layer.key, number),
        _read=reader(lambda: layer.matrix), _write=lambda m: _copy(layer.matrix, m),
        expert=Expert(-1, number, part), index=number, replaceable=True,
        slot=ExpertSlot(module, parameter, number), plain=_flipped(are_transposed(module)),
    )


def _flipped(transposed: bool) -> Callable[[Tensor], Tensor]:
    return (lambda t: t.T) if transposed else (lambda t: t)


@torch.no_grad()
def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


class FusedExpert(nn.Module):
    """The product with one expert's slice of a fused parameter, which stays the model's own.

    Parameters
    ----------
    module : nn.Module
        What holds the parameter, or the `Experts` in its place.
    """

    def __init__(self, module: nn.Module, parameter: str, number: int) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple: the model owns it, not this layer
        self.parameter, self.number = parameter, number

    @property
    def matrix(self) -> Tensor:
        """The expert's matrix as (out, in)."""
        (module,) = self._module
        held = getattr(module, self.parameter)
        whole: Any = held.fused if isinstance(held, Experts) else held
        return _flipped(are_transposed(module))(whole[self.number])

    @property
    def key(self) -> tuple[Any, ...]:
        """Identity of the fused parameter."""
        (module,) = self._module
        held = getattr(module, self.parameter)
        fused = isinstance(held, Experts)
        return tensor_key(held, "fused") if fused else tensor_key(module, self.parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, shape (..., out)."""
        return nn.functional.linear(x, self.matrix)

    def held_weights(self, path: str) -> Iterator[Weight]:
        """Yield the expert's matrix; `path` is its name."""
        (module,) = self._module
        block = path.rpartition(".")[0].rpartition(".")[0]
        yield _fused(module, block, self.parameter, self.number)


class PlainExpert(nn.Module):
    """One expert's matrix as a parameter of its own, kept the way round of the fused one."""

    is_expert = True  # nothing but a matrix: packing may take its place

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        super().__init__()
        self.weight, self.transposed = nn.Parameter(weight, requires_grad=weight.requires_grad), transposed

    @property
    def matrix(self) -> Tensor:
        """The expert's matrix as (out, in)."""
        return _flipped(self.transposed)(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, shape (..., out)."""
        return nn.functional.linear(x, self.matrix)

    def held_weights(self, path: str) -> Iterator[Weight]:
        """Yield the expert's matrix."""
        out, columns = self.matrix.shape
        yield Weight(path, "expert", (out, columns), self.weight.dtype, path, self, "weight",
                     tensor_key(self, "weight"), _read=reader(lambda: self.matrix),
                     _write=lambda m: _copy(self.matrix, m), replaceable=True,
                     plain=_flipped(self.transposed))


class Experts(nn.Module):
    """Takes the place of a fused expert parameter: `experts[e]` acts as expert e's matrix, and
    `torch.bmm(x, experts)` as all of them, each on its own x[e] (T, in).

    Parameters
    ----------
    module : nn.Module
        What holds the parameter.
    parameter : str
        Its name (`gate_up_proj`).
    """

    fused: nn.Parameter | None

    def __init__(self, module: nn.Module, parameter: str) -> None:
        super().__init__()
        self._module = (module,)
        self.parameter, self.transposed = parameter, are_transposed(module)
        fused: nn.Parameter = getattr(module, parameter)
        self.n = len(fused)
        self.register_parameter("fused", fused)
        self.layers = nn.ModuleDict()
        self._order = list(module._parameters)
        beside = next((c for c in module.children() if isinstance(c, Experts)), None)
        self._config: Any = beside._config if beside else getattr(module, "config", None)

    def __getitem__(self, index: Any) -> Any:
        number = str(int(index))
        if number in self.layers:
            return Product(self.layers[number], transposed=self.transposed)
        return self.fused[int(index)]  # type: ignore[index]

    @property
    def shape(self) -> torch.Size:
        """Of the fused parameter."""
        return torch.Size((self.n, *self[0].shape))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, experts, _ = operands(func, args, kwargs or {})
        batched = func in _BATCHED and isinstance(x, Tensor) and x.ndim == 3
        if batched and isinstance(experts, cls):
            return torch.stack([x[n] @ experts[n] for n in range(experts.n)])
        raise ConfigError(_first((args, kwargs))._misused(f"in {getattr(func, '__name__', func)}"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not hasattr(Tensor, name):
                raise
            raise AttributeError(self._misused(f"by .{name}")) from None

    def _misused(self, how: str) -> str:
        (module,) = self._module
        return (f"{type(module).__name__}.{self.parameter}: experts that are packed or adapted take part "
                f"in bmm and in each expert's own product, not {how}: leave them out, "
                f'exclude_modules=["experts.*"]')

    def install(self) -> None:
        """Stand in for the parameter. Fused kernels need the 3-D tensor; the plain loop over experts asks
        for one matrix at a time."""
        (module,) = self._module
        delattr(module, self.parameter)
        setattr(module, self.parameter, self)
        if hasattr(self._config, "_experts_implementation"):
            module.config = copy.copy(self._config)  # shared by the whole model otherwise
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]

    def remove(self) -> None:
        """Give the same parameter object back to the module."""
        (module,) = self._module
        delattr(module, self.parameter)
        module.register_parameter(self.parameter, self.fused)
        for name in self._order[self._order.index(self.parameter) + 1:]:
            if name in module._parameters:  # others may still be replaced
                module._parameters[name] = module._parameters.pop(name)
        # both parameters of the module may have a layer in their place: the last one to go restores it
        if self._config is not None and not any(isinstance(c, Experts) for c in module.children()):
            module.config = self._config

    def unfuse(self) -> None:
        """Give every expert that no layer has replaced a parameter of its own, and drop the fused one."""
        if self.fused is None:
            return
        for number in range(self.n):
            if str(number) not in self.layers:
                one = self.fused.detach()[number].clone().requires_grad_(self.fused.requires_grad)
                self.layers[str(number)] = PlainExpert(one, self.transposed)
        self.fused = None

    def plain_parameters(self) -> list[nn.Parameter]:
        """Return the matrices of experts that have a parameter of their own, adapted ones too."""
        plain = (m for m in self.layers.modules() if isinstance(m, PlainExpert))
        return [one.weight for one in plain]

    def fuse(self) -> None:
        """Give the module a fused parameter again, once every expert is a plain one."""
        plain = [self.layers[str(n)] for n in range(self.n) if str(n) in self.layers]
        if len(plain) < self.n or not all(isinstance(one, PlainExpert) for one in plain):
            return
        weights: list[Any] = [one.weight for one in plain]
        trains = all(w.requires_grad for w in weights)
        self.fused = nn.Parameter(torch.stack([w.detach() for w in weights]), requires_grad=trains)
        self.layers.clear()
        self.remove()

    def held_weights(self, path: str) -> Iterator[Weight]:
        """Yield every expert's matrix; `path` is that of the parameter."""
        (module,) = self._module
        block, part = path.rpartition(".")[0], part_name(self.parameter)
        for number in range(self.n):
            if str(number) not in self.layers:
                yield _fused(module, block, self.parameter, number)
                continue
            layer: Any = self.layers[str(number)]
            for weight in layer.held_weights(joined(block, str(number), part)):
                yield replace(weight, role="expert", expert=Expert(-1, number, part), index=number,
                              state_key=path, slot=ExpertSlot(module, self.parameter, number), beside=tuple)


def _first(given: Any) -> Any:
    """Return the first `Experts` among what a function was given, in lists and mappings too."""
    if isinstance(given, Experts):
        return given
    given = given.values() if isinstance(given, dict) else given
    if not isinstance(given, (list, tuple, ValuesView)):
        return None
    return next((found for one in given if (found := _first(one)) is not None), None)


@dataclass(frozen=True)
class ExpertSlot:
    """The place of one expert's product in a fused parameter."""

    module: nn.Module
    parameter: str
    number: int

    def get(self) -> nn.Module:
        held = getattr(self.module, self.parameter)
        if isinstance(held, Experts) and str(self.number) in held.layers:
            return held.layers[str(self.number)]
        return FusedExpert(self.module, self.parameter, self.number)

    def put(self, layer: nn.Module) -> None:
        held = self.experts()
        if not isinstance(layer, FusedExpert):
            held.layers[str(self.number)] = layer
            held.fuse()
            return
        if str(self.number) in held.layers:
            del held.layers[str(self.number)]
        if not held.layers and held.fused is not None:
            held.remove()

    def foreign(self) -> str:
        """Return the kind of a layer in the block that is neither plain nor packed; empty without one."""
        held = getattr(self.module, self.parameter)
        layers = held.layers.values() if isinstance(held, Experts) else ()
        return next((type(one).__name__ for one in layers if not getattr(one, "is_expert", False)), "")

    def experts(self) -> Experts:
        """Return what stands in for the parameter, made when it does not yet."""
        held = getattr(self.module, self.parameter)
        if not isinstance(held, Experts):
            held = Experts(self.module, self.parameter)
            held.install()
        return held
