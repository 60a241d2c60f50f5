"""The options of a compander as plain values: what the method is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How weights are companded; each value as in `WeightCompander`, which says what is allowed."""

    function: str = "arctan"
    a: float = 0.7
    b: float = 0.7
    learn: str = "none"
    decay_on: str | None = None
    bound_policy: str = "raise"
    guard: str = "softplus"
    path: str = "fast"

    @property
    def decays_v(self) -> bool:
        """Whether weight decay acts on v; without `decay_on`: for learned pairs, as in the paper."""
        return (self.decay_on or ("w" if self.learn == "none" else "v")) == "v"
