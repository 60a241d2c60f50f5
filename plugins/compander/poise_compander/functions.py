"""Companding functions w = Psi(v) = a psi(v / b): map, inverse, derivatives, bound.

`psi` is odd and increasing; `a` scales w, `b` stretches v. A function works on tensors, NumPy arrays and
numbers, elementwise, and gives back what it was given. Another one is added by `register`.

Source: arXiv 2306.16993 eq. 1 (arctan) and table II (arsinh, erf).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import ConfigError, nearest

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Function:
    """A companding function by its unit form.

    Parameters
    ----------
    name : str
    psi : callable
        The map for a = b = 1, tensor to tensor, elementwise, odd, increasing.
    psi_inverse : callable
        Its inverse on (-limit, limit); what it returns elsewhere is not used.
    psi_derivative : callable
        Its derivative, in a form that neither overflows nor cancels for large |v|.
    limit : float
        Supremum of psi; infinity where there is none.
    """

    name: str
    psi: Map
    psi_inverse: Map
    psi_derivative: Map
    limit: float = math.inf

    def forward(self, v: Any, a: Any, b: Any) -> Any:
        """Return w = a psi(v / b)."""
        return _on(lambda v, a, b: a * self.psi(v / b), v, a, b)

    def inverse(self, w: Any, a: Any, b: Any) -> Any:
        """Return v with forward(v) = w; NaN at and beyond the bound, never a wrong branch.

        Computed in float64: near the bound a rounding of w / a in float32 would move v by its own size.
        """
        return _on(self._inverse, w, a, b)

    def _inverse(self, w: Tensor, a: Any, b: Any) -> Tensor:
        u = w.double() / a
        v = torch.where(u.abs() < self.limit, b * self.psi_inverse(u), math.nan)
        return v.to(w.dtype)

    def derivative(self, v: Any, a: Any, b: Any) -> Any:
        """Return Psi'(v) = dw / dv; a / b at 0."""
        return _on(lambda v, a, b: (a / b) * self.psi_derivative(v / b), v, a, b)

    def by_a(self, v: Any, a: Any, b: Any) -> Any:
        """Return dw / da = psi(v / b) = w / a."""
        return _on(lambda v, a, b: self.psi(v / b), v, a, b)

    def by_b(self, v: Any, a: Any, b: Any) -> Any:
        """Return dw / db = -(v / b) Psi'(v)."""
        return _on(lambda v, a, b: -(v / b) * (a / b) * self.psi_derivative(v / b), v, a, b)

    def bound(self, a: float) -> float:
        """Return the supremum of |w|."""
        return a * self.limit


def _on(act: Callable[..., Tensor], x: Any, a: Any, b: Any) -> Any:
    """Apply a tensor function to a tensor, an array or a number; return the same kind, made real.

    Raises
    ------
    ConfigError
        For what is no real number, or an array of such.
    """
    if isinstance(x, Tensor):
        return act(x if x.is_floating_point() else x.to(torch.get_default_dtype()), a, b)
    found = act(*(_tensor(y) if isinstance(y, np.ndarray) or y is x else y for y in (x, a, b)))
    array = found.detach().numpy()
    return array if isinstance(x, np.ndarray) or array.ndim else array.item()


def _tensor(x: Any) -> Tensor:
    """Return a copy of an array or a number as a tensor, whatever its strides, bytes or precision."""
    array = np.asarray(x)
    if array.dtype.kind not in "fiu":
        raise ConfigError(f"companding functions take real numbers, not {array.dtype} ({x!r:.60})")
    kind = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=kind if kind in (np.float32, np.float16) else np.float64))


def _sech_squared(u: Tensor) -> Tensor:
    """Return 1 - tanh(u)^2 without cancellation."""
    e = torch.exp(-2 * u.abs())
    return 4 * e / (1 + e).square()


arctan = Function("arctan", torch.atan, torch.tan, lambda u: 1 / (1 + u.square()), math.pi / 2)
erf = Function("erf", torch.erf, torch.erfinv,
               lambda u: (2 / math.sqrt(math.pi)) * torch.exp(-u.square()), 1.0)
arsinh = Function("arsinh", torch.asinh, torch.sinh, lambda u: 1 / torch.hypot(u, torch.ones_like(u)))
tanh = Function("tanh", torch.tanh, torch.atanh, _sech_squared, 1.0)

FUNCTIONS: dict[str, Function] = {f.name: f for f in (arctan, erf, arsinh, tanh)}


def power(alpha: float) -> Function:
    """Return w = v |v|^(alpha - 1), known by its name from then on: powerpropagation, for comparison.

    Its derivative is 0 at 0, where no step leads away from: it is no compander, and `register` refuses it.
    """
    name = f"power{alpha:g}"
    return FUNCTIONS.setdefault(name, Function(
        name, lambda u: u.sign() * u.abs().pow(alpha), lambda u: u.sign() * u.abs().pow(1 / alpha),
        lambda u: alpha * u.abs().pow(alpha - 1)))


def named(name: str) -> Function:
    """Return a function by its name.

    Raises
    ------
    ConfigError
        For an unknown name, with those there are.
    """
    if name not in FUNCTIONS:
        raise ConfigError(f"compander: no function {name!r}{nearest(name, list(FUNCTIONS))} "
                          f"(there are: {', '.join(FUNCTIONS)})")
    return FUNCTIONS[name]


def register(function: Function) -> Function:
    """Make a function known by its name, after `check_function`.

    Raises
    ------
    ConfigError
        When the name is taken, or its parts contradict one another.
    """
    if function.name in FUNCTIONS:
        raise ConfigError(f"compander: there is a function {function.name!r} already: choose another name")
    check_function(function)
    FUNCTIONS[function.name] = function
    return function


def check_function(function: Function, a: float = 0.8, b: float = 0.6) -> None:
    """Hold a function against its definition, in float64.

    Raises
    ------
    ConfigError
        Naming what fails: odd, increasing, bounded, the derivative, the inverse both ways, up to the bound.
    """
    u = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    v = b * u
    w, slope = function.forward(v, a, b), function.derivative(v, a, b)
    _expect(function, "is not odd", torch.allclose(w, -w.flip(0), rtol=1e-12, atol=1e-14))
    _expect(function, "is not increasing", bool((w.diff() >= 0).all() and (slope >= 0).all()
                                                and slope[len(slope) // 2] > 0))
    bound = function.bound(a)
    _expect(function, f"exceeds its bound {bound:g}", bool((w.abs() <= bound).all()))
    inside = w.abs() < 0.999 * function.bound(a)
    back = function.inverse(w[inside], a, b)
    _expect(function, "has another inverse", torch.allclose(back, v[inside], rtol=1e-9, atol=1e-12))
    again = function.forward(back, a, b)
    _expect(function, "has another inverse", torch.allclose(again, w[inside], rtol=1e-12, atol=1e-14))
    large = function.forward(torch.tensor([1e3, 1e6, 1e12], dtype=torch.float64), a, b)
    _expect(function, f"exceeds its bound {bound:g} far out, or is no number there",
            bool((large <= bound * (1 + 1e-12)).all()))
    shares = torch.tensor([0.9, 0.99, 0.999, 1 - 1e-6, 1 - 1e-9], dtype=torch.float64)
    far = a * min(function.limit, 10.0) * shares
    reached = function.forward(function.inverse(far, a, b), a, b)  # |v| may be larger than in u above
    _expect(function, f"has limit {function.limit:g}, but does not reach it, or has another inverse there",
            torch.allclose(reached, far, rtol=1e-9))
    h = 1e-6
    found = (function.forward(v + h, a, b) - function.forward(v - h, a, b)) / (2 * h)
    _expect(function, "has another derivative", torch.allclose(slope, found, rtol=1e-5, atol=1e-9))


def _expect(function: Function, fault: str, holds: bool) -> None:
    if not holds:
        raise ConfigError(f"companding function {function.name!r} {fault}")
