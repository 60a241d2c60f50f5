"""Weights near or over the bound of Psi at attach: what to do with them, and what to say.

Source: arXiv 2306.16993 only asks for a >= 0.5; Kaiming-uniform filters with fan-in up to 9 overflow there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import ConfigError
from poise_compander.functions import Function

MARGIN = 1e-3  # a weight nearer to the bound than this share of it cannot move any more
_ROUNDING = 2  # units in the last place by which a saturated weight may have been rounded to its bound
NEAR = 0.9  # of the bound: there the step of w is below a thousandth of what it is at 0 (arctan)


@dataclass(frozen=True)
class Finding:
    """One weight against its bound: the largest |w|, how many lie near it, how many over it."""

    largest: float
    near: int
    over: int


def look(function: Function, w: Tensor, a: float, name: str) -> Finding:
    """Count the entries near and over the bound.

    Raises
    ------
    ConfigError
        For a weight that is not finite.
    """
    size = w.detach().abs()
    if not bool(torch.isfinite(size).all()):
        raise ConfigError(f"compander: {name} has NaN or Inf: initialise or load it before attach")
    bound, largest = function.bound(a), float(size.max())
    if math.isinf(bound):
        return Finding(largest, 0, 0)
    over = int((size > (1 - MARGIN) * bound).sum())
    return Finding(largest, int((size > NEAR * bound).sum()) - over, over)


def fitting(function: Function, largest: float) -> float:
    """Return the smallest a whose bound, less the margin, holds a weight of this size."""
    return largest / ((1 - MARGIN) * function.limit)


def refuse(function: Function, a: float, found: dict[str, Finding]) -> None:
    """Raise `ConfigError` for the layer with the largest |w| over the bound, if there is one."""
    worst = max(found, key=lambda name: found[name].largest)
    if not found[worst].over:
        return
    layers = sum(1 for finding in found.values() if finding.over)
    raise ConfigError(
        f"compander: {found[worst].over} weights of {worst} reach the bound "
        f"{(1 - MARGIN) * function.bound(a):.4g} of a={a:g} (largest |w| {found[worst].largest:.4g}"
        f"{f'; {layers - 1} more layers have such' if layers > 1 else ''}): give "
        f"a={rounded_up(fitting(function, found[worst].largest))} or more, or bound_policy='grow' or "
        f"'clamp'"
    )


def beyond(function: Function, w: Tensor, a: float, name: str) -> str:
    """Return in words that a weight has no v, being over the bound or not finite; or nothing."""
    size, bound = w.detach().abs(), function.bound(abs(a))
    slack = 1 + _ROUNDING * torch.finfo(w.dtype).eps
    over = int((~((size <= bound * slack) & torch.isfinite(size))).sum())
    if not over:
        return ""
    largest = float(size.max())
    if not math.isfinite(largest):
        return f"{over} weights of {name} are NaN or Inf"
    return (f"{over} weights of {name} reach the bound {bound:.4g} of a={a:g} (largest |w| {largest:.4g}): "
            f"attach with a={rounded_up(fitting(function, largest))} or more")


def below(function: Function, w: Tensor, a: float) -> Tensor:
    """Return w with entries that were rounded to the bound just below it, where they have a v."""
    limit = function.bound(abs(a)) * (1 - _ROUNDING * torch.finfo(w.dtype).eps)
    return w.clamp(-limit, limit)


def rounded_up(x: float, digits: int = 4) -> float:
    """Round up to some significant digits, so that what a message says does fit."""
    unit = 10.0 ** (math.floor(math.log10(x)) - digits + 1)
    return float(f"{math.ceil(x / unit) * unit:.{digits}g}")


def clamped(function: Function, w: Tensor, a: float) -> Tensor:
    """Return the weight inside the usable range."""
    limit = (1 - MARGIN) * function.bound(a)
    return w.clamp(-limit, limit)
