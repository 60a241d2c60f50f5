"""What share of a model's weights a method takes, what it leaves out, and why."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

ASKED = "as target_modules and exclude_modules say"
_NAMED = 3  # weights that are named for each reason


@dataclass(frozen=True)
class Coverage:
    """Counts of numbers.

    Parameters
    ----------
    taken : int
    left : list of (name, count, reason)
    """

    taken: int
    left: list[tuple[str, int, str]]

    @property
    def total(self) -> int:
        """All numbers of the model's matrices."""
        return self.taken + sum(count for _, count, _ in self.left)

    def report(self) -> dict[str, Any]:
        """Return plain values: the share taken, and for each reason the share left out and some names."""
        return {"share": self.taken / self.total, "left_out": {
            reason: {"share": sum(n for _, n, _ in found) / self.total, "weights": len(found),
                     "first": [name for name, _, _ in found[:_NAMED]]}
            for reason, found in self._by_reason().items()}}

    def tell(self, method: str) -> None:
        """Warn, once, where weights are left out that nobody has asked to leave out."""
        parts = [f"{_percent(sum(n for _, n, _ in found), self.total)} {reason} ({_names(found)})"
                 for reason, found in self._by_reason().items() if reason != ASKED]
        if parts:
            warnings.warn(f"{method} takes {_percent(self.taken, self.total)} of the model's weights; left "
                          f"out: {'; '.join(parts)}", stacklevel=2)

    def _by_reason(self) -> dict[str, list[tuple[str, int, str]]]:
        found: dict[str, list[tuple[str, int, str]]] = {}
        for one in self.left:
            found.setdefault(one[2], []).append(one)
        return found


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %"


def _names(found: list[tuple[str, int, str]]) -> str:
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(name for name, _, _ in found[:_NAMED]) + more
