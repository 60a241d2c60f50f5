"""Plans of bits per expert, as data: {weight name: bits}.

An expert's matrices share its bits (EdgeMoE section III-B). Which half keeps more bits is decided
here by weight error; by measured loss in a later issue.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from poise.errors import ConfigError
from poise.walk import Weight, weights


def experts(model: nn.Module) -> dict[str, list[Weight]]:
    """Return the matrices of each expert, by the expert's name (`...experts.5`).

    Raises
    ------
    ConfigError
        When the model has no experts.
    """
    found: dict[str, list[Weight]] = {}
    for w in weights(model):
        if w.role == "expert":
            found.setdefault(w.name.rpartition(".")[0], []).append(w)
    if not found:
        raise ConfigError("the model has no routed experts: use a mixture-of-experts model")
    return found


def expert_errors(model: nn.Module, quantizer: Any, bits: int) -> dict[str, float]:
    """Return each expert's squared weight error, summed over its matrices, when stored at `bits`."""
    at = quantizer.at(bits)
    errors = {}
    for name, matrices in experts(model).items():
        errors[name] = sum(
            float((at.quantize(w.read()).dequantize() - w.read()).square().sum()) for w in matrices
        )
    return errors


def uniform_plan(model: nn.Module, bits: int) -> dict[str, int]:
    """Return the plan that stores every expert at `bits`."""
    return {w.name: bits for group in experts(model).values() for w in group}


def half_plan(model: nn.Module, errors: dict[str, float], high: int, low: int) -> dict[str, int]:
    """Return the plan in which the half with the larger errors keeps `high` bits."""
    order = sorted(errors, key=lambda n: (-errors[n], n))
    return _plan(model, set(order[: len(order) // 2]), high, low)


def random_plan(model: nn.Module, seed: int, high: int, low: int) -> dict[str, int]:
    """Return the plan in which a random half keeps `high` bits."""
    names = sorted(experts(model))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return _plan(model, {names[i] for i in order[: len(names) // 2]}, high, low)


def _plan(model: nn.Module, kept: set[str], high: int, low: int) -> dict[str, int]:
    return {w.name: high if name in kept else low
            for name, group in experts(model).items() for w in group}
