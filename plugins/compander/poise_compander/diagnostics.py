"""What a compander does to a network: frozen shares, learning-rate factors, percentile bands.

Source: arXiv 2306.16993 figures 3 and 4 (bands of the first convolution over training).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from poise_compander.functions import Function
from poise_compander.scales import Scales

PERCENTILES = (0.0, 7.0, 16.0, 31.0, 50.0, 69.0, 84.0, 93.0, 100.0)
FROZEN = 0.1  # of the largest Psi'
ZERO = 0.01  # |w| below this counts as near zero


class Seen(Protocol):
    """What is looked at here: what `WeightCompander.attach` returns."""

    @property
    def companded(self) -> Mapping[str, Any]: ...

    @property
    def function(self) -> Function: ...

    def scales(self, name: str) -> Scales: ...

    def v(self, name: str) -> Tensor: ...

    def w(self, name: str) -> Tensor: ...


def effective_lr_factor(a: float, b: float) -> float:
    """Return (a / b)^2: near zero, an SGD step of w is that of plain training times this."""
    return (a / b) ** 2


@torch.no_grad()
def slopes(attached: Seen, name: str) -> Tensor:
    """Return Psi'(v) / Psi'(0) of a layer, in the shape of its weight, between 0 and 1.

    Powerpropagation's Psi'(0) is 0: there it is Psi'(v) itself.
    """
    a, b = attached.scales(name).numbers()
    zero = attached.function.derivative(0.0, a, b) or 1.0
    return attached.function.derivative(attached.v(name).detach(), a, b) / zero


def saturated_share(attached: Seen) -> float:
    """Return the share of companded weights whose Psi' is below a tenth of its largest value."""
    low = total = 0
    for name in attached.companded:
        slope = slopes(attached, name)
        low += int((slope < FROZEN).sum())
        total += slope.numel()
    return low / total


def layer_table(attached: Seen) -> list[dict[str, Any]]:
    """Return a row for each layer: its pair, learning-rate factors, frozen share, share near zero.

    `mean_lr_factor` is the mean of Psi'(v)^2, by which an SGD step of w is multiplied.
    """
    rows = []
    for name in attached.companded:
        a, b = attached.scales(name).numbers()
        slope, w = slopes(attached, name), attached.w(name)
        zero = attached.function.derivative(0.0, a, b) or 1.0
        rows.append({
            "layer": name, "a": a, "b": b, "effective_lr_factor": effective_lr_factor(a, b),
            "mean_lr_factor": float((slope * zero).square().mean()),
            "saturated_share": float((slope < FROZEN).float().mean()),
            "near_zero_share": float((w.abs() < ZERO).float().mean()), "largest": float(w.abs().max()),
        })
    return rows


class Watched:
    """What a run records and draws of an adapter, whatever the adapter does to its layers."""

    def weights(self) -> dict[str, Tensor]:
        """Return the present weights by layer name, detached."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Return what is recorded at each evaluation: bands of the first layer, the share near zero."""
        return observed(self.weights())

    def draw(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        """Draw recorded bands and pairs over the steps into a folder."""
        from poise_compander.plots import draw

        draw(folder, rows)


def observed(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what is recorded at each evaluation: bands of the first layer's weights, share near zero."""
    first = next(iter(weights))
    found = {f"bands/{first}/{p:g}": value for p, value in zip(PERCENTILES, bands(weights[first]))}
    near = sum(int((w.abs() < ZERO).sum()) for w in weights.values())
    return found | {"near_zero_share": near / sum(w.numel() for w in weights.values())}


@torch.no_grad()
def bands(weight: Tensor | nn.Parameter, percentiles: tuple[float, ...] = PERCENTILES) -> list[float]:
    """Return percentiles of a weight's entries, as in the paper's figures."""
    flat = weight.detach().flatten().double().cpu().numpy()  # torch.quantile ends at 2^24 entries
    return np.percentile(flat, percentiles).tolist()
