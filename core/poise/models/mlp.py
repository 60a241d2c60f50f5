"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def make_mlp(
    inputs: int, outputs: int, hidden: Sequence[int], activation: str = "relu", dropout: float = 0.0
) -> nn.Sequential:
    """Return a network from (batch, ...), flattened to `inputs`, to (batch, outputs)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
