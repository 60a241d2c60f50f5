"""How much each width damages each expert: of its weights, and of what it says for calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from poise_edgemoe.experts import StoredExperts
from poise_edgemoe.store.schemes import RawMatrix
from poise_edgemoe.widths.forms import Forms, round_trip
from poise_edgemoe.widths.raw_experts import Parts
from poise_edgemoe.widths.spool import Inputs

ROWS = 4096  # tokens that an expert is given at a time


@dataclass
class Row:
    """One expert, or one matrix of it, at every width.

    Attributes
    ----------
    tokens : int
        Calibration tokens that its router sent to it.
    kept : int
        Of those, the ones that the output error is taken on.
    nbytes : dict
        Width to bytes in a store, pages filled up.
    weight_error : dict
        Width to ||W - W^||^2.
    output_error : dict
        Width to sum over tokens of g^2 ||f(h) - f^(h)||^2; of an expert without tokens estimated.
    output_error_se : dict
        Its standard error.
    """

    name: str
    layer: int
    expert: int
    parts: list[str]
    tokens: int = 0
    kept: int = 0
    nbytes: dict[int, int] = field(default_factory=dict)
    weight_error: dict[int, float] = field(default_factory=dict)
    output_error: dict[int, float] = field(default_factory=dict)
    output_error_se: dict[int, float] = field(default_factory=dict)


class Given:
    """Makes matrices stand in an expert's products: what `StoredExperts` asks a cache for."""

    def __init__(self, parts: Mapping[str, tuple[Tensor, Tensor | None]], transposed: bool) -> None:
        self.parts, self.transposed = parts, transposed

    def __call__(self, e: int, part: str) -> tuple[RawMatrix, Tensor | None]:
        weight, bias = self.parts[part]
        matrix = weight.T if self.transposed else weight
        return RawMatrix(matrix.contiguous(), weight.dtype), bias


def said(module: StoredExperts, e: int, parts: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """Return what an expert with these matrices says, (tokens, hidden)."""
    held: Any = Given(parts, module.transposed)
    return torch.cat([module._experts([e], [x], held)[0] for x in hidden.split(ROWS)])


def inner_inputs(module: StoredExperts, e: int, parts: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """Return what an expert's second matrix is multiplied with."""
    held: Any = Given(parts, module.transposed)
    like: Any = module._like[0]
    first, act = ("wi", like[f"expert_{e}"].act) if module.switch else ("gate_up", like._apply_gate)
    return torch.cat([act(module._product(x, *held(e, first))) for x in hidden.split(ROWS)])


def moments_of(module: StoredExperts, e: int, parts: Parts, hidden: Tensor) -> dict[str, Tensor]:
    """Return the mean square of each input, by part; empty for an expert without tokens."""
    if not len(hidden):
        return {}
    first, second = parts
    inner = inner_inputs(module, e, parts, hidden)
    return {first: hidden.float().square().mean(0), second: inner.float().square().mean(0)}


@torch.no_grad()
def measure_expert(
    module: StoredExperts, e: int, parts: Parts, inputs: Inputs, forms: Forms, most: int, *, per: str,
    path: str,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Return an expert's rows, one or one for each matrix, and the mean squares of its inputs."""
    hidden, gates, tokens = inputs.of(e, most)
    moments = moments_of(module, e, parts, hidden)
    name = f"{path}.{e}"
    groups = [list(parts)] if per == "expert" else [[part] for part in parts]
    rows = [Row(name if per == "expert" else f"{name}.{g[0]}", module.number, e, g, tokens, len(gates))
            for g in groups]
    right = said(module, e, parts, hidden) if tokens else None
    for bits in forms.widths:
        made = {p: round_trip(forms.at(bits, moments.get(p)), w, bias) for p, (w, bias) in parts.items()}
        for row in rows:
            row.nbytes[bits] = sum(made[p][1] for p in row.parts)
            row.weight_error[bits] = sum(_square(parts[p][0], made[p][0]) for p in row.parts)
            if right is None:
                continue
            mixed = {p: (made[p][0] if p in row.parts else w, bias) for p, (w, bias) in parts.items()}
            wrong = said(module, e, mixed, hidden)
            row.output_error[bits], row.output_error_se[bits] = _total(right, wrong, gates, tokens)
    return rows, moments


def _square(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


def _total(right: Tensor, wrong: Tensor, gates: Tensor, tokens: int) -> tuple[float, float]:
    """Return the weighted error of all tokens, from those that were kept, and its standard error."""
    each = gates.double().square() * (right.double() - wrong.double()).square().sum(-1)
    error = float(each.std()) * tokens / math.sqrt(len(each)) if len(each) > 1 else 0.0
    return float(each.mean()) * tokens, error


def fill_unvisited(rows: list[Row]) -> list[str]:
    """Estimate output errors of experts without tokens from those of their weights; return their names.

    The median ratio of the two errors in their layer stands for theirs; of no error but that of weights
    that are stored as they are does 0 come out.
    """
    bare = [r for r in rows if not r.tokens]
    for row in bare:
        peers = [r for r in rows if r.tokens and r.layer == row.layer and r.parts == row.parts]
        for bits, error in row.weight_error.items():
            ratios = [r.output_error[bits] / r.weight_error[bits] for r in peers
                      if r.weight_error[bits] > 0]
            least = min((x for x in ratios if x > 0), default=1.0)
            row.output_error[bits] = error * max(median(ratios) if ratios else 0.0, least) if error else 0.0
            row.output_error_se[bits] = 0.0
    return [r.name for r in bare]
