"""A small convolutional network with batch norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def make_cnn(channels: int, classes: int, widths: Sequence[int]) -> nn.Sequential:
    """Return a network from (batch, channels, h, w) to (batch, classes); convolutions halve h and w."""
    layers: list[nn.Module] = []
    for before, width in zip([channels, *widths], widths):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width),
                   nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    network = nn.Sequential(*layers)
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    return network
