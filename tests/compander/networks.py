"""Small networks and data that the compander's tests share."""

from __future__ import annotations

import torch
from torch import nn

from poise.walk import weights


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


X, Y = randn(16, 6), randn(16, 3, seed=1)


def loss_of(model, x=X, y=Y):
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model


def w_of(model):
    return {w.name: w.read().clone() for w in weights(model)}


def largest_difference(first, second):
    return max(float((first[k] - second[k]).abs().max()) for k in first)


def steady(dtype=torch.float64):
    """Return a network whose training contracts: two runs that differ by rounding stay that near."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


class Tied(nn.Sequential):
    """An embedding whose weight is that of the output layer."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Embedding(10, 6), nn.Tanh(), nn.Linear(6, 10))
        self[0].weight.data.mul_(0.2)
        self[2].weight = self[0].weight
