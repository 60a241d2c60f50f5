"""Companding functions: map, inverse, derivative, bound.

A function is elementwise, odd and increasing; `a` scales w, `b` stretches v.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Arctan:
    """w = a arctan(v / b), |w| < a pi / 2. Source: arXiv 2306.16993 eq. 1."""

    name = "arctan"

    @staticmethod
    def map(v: Tensor, a: float, b: float) -> Tensor:
        """Return w = a arctan(v / b)."""
        return a * torch.atan(v / b)

    @staticmethod
    def inverse(w: Tensor, a: float, b: float) -> Tensor:
        """Return v = b tan(w / a); the caller has checked |w| < bound, beyond which tan is wrong."""
        return b * torch.tan(w / a)

    @staticmethod
    def derivative(v: Tensor, a: float, b: float) -> Tensor:
        """Return Psi'(v) = a b / (b^2 + v^2)."""
        return a * b / (b * b + v * v)

    @staticmethod
    def bound(a: float) -> float:
        """Return the supremum of |w|."""
        return a * math.pi / 2
