"""The reference path: torch's parametrize recomputes w = Psi(v) at every use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise_compander.functions import Arctan

MARGIN = 1e-3  # a weight nearer to the bound than this share of it cannot move any more


class Psi(nn.Module):
    """The parametrization w = Psi(v) with fixed a and b, and its exact inverse."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, v: Tensor) -> Tensor:
        """Return w, same shape as v."""
        return Arctan.map(v, self.a, self.b)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return v with Psi(v) = w.

        Raises
        ------
        ConfigError
            When a weight reaches the bound: tan would silently return a wrong branch.
        """
        over = int((w.abs() >= Arctan.bound(self.a)).sum())
        if over:
            raise ConfigError(
                f"compander: {over} weights reach the bound a pi/2 = {Arctan.bound(self.a):.4g} "
                f"(largest {float(w.abs().max()):.4g}): raise a"
            )
        return Arctan.inverse(w, self.a, self.b)

    def derivative(self, v: Tensor) -> Tensor:
        """Return Psi'(v), same shape as v."""
        return Arctan.derivative(v, self.a, self.b)


def within_bound(w: Tensor, a: float, name: str, policy: str) -> tuple[Tensor, int]:
    """Return the weight inside the usable range, and how many entries had to be moved.

    Raises
    ------
    ConfigError
        With policy "raise", naming the layer, the largest weight and the smallest a that fits.
    """
    limit = (1 - MARGIN) * Arctan.bound(a)
    over = int((w.abs() > limit).sum())
    if over and policy == "raise":
        largest = float(w.abs().max())
        fitting = largest / ((1 - MARGIN) * Arctan.bound(1.0))
        raise ConfigError(
            f"compander: {over} weights of {name} reach the bound {limit:.4g} of a={a:g} (largest "
            f"{largest:.4g}): write adapter.a={fitting * 1.05:.3g} or more, or adapter.bound=clamp"
        )
    return (w.clamp(-limit, limit) if over else w), over


@torch.no_grad()
def l2_term(psi: Psi, v: Tensor, decay: float) -> Tensor:
    """Return the gradient of (decay / 2) w^2 with respect to v: decay w Psi'(v)."""
    return decay * psi(v) * psi.derivative(v)
