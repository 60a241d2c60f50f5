"""How many expert uses may be served from bases: a share of an answer's, and of any stretch of it."""

from __future__ import annotations

from math import isfinite
from typing import Any

from poise.errors import ConfigError

WINDOW = 1024  # uses that are looked back on: what was not taken of earlier ones is lost
SLACK = 1e-9  # of rounding


class Allowance:
    """Each use of an expert by a decoded token earns `share`; a use that is served from a base takes 1.

    An answer begins with nothing. So at every moment of it no more than `share` of its uses so far were
    served from bases, and of any stretch of n uses no more than share (n + `WINDOW`), or share n + 1 where
    that is more. Uses count alike, whatever the router weighs them.

    Attributes
    ----------
    uses, taken : int
        Since an engine was opened.
    answer_uses, answer_taken : int
        Of the answer that runs, or was the last.
    """

    def __init__(self, share: float) -> None:
        self.share, self._left = share, 0.0
        self.uses = self.taken = self.answer_uses = self.answer_taken = 0

    def begin(self) -> None:
        """Begin an answer."""
        self._left, self.answer_uses, self.answer_taken = 0.0, 0, 0

    def earn(self, uses: int) -> None:
        """Count uses."""
        self.uses += uses
        self.answer_uses += uses
        self._left = min(self._left + self.share * uses, max(1.0, self.share * WINDOW))

    def take(self) -> bool:
        """Return whether a use may be served from a base, and count it if so."""
        if self._left < 1 - SLACK:
            return False
        self._left -= 1
        self.taken += 1
        self.answer_taken += 1
        return True

    def words(self) -> str:
        """Return in words what bases have served in the last answer."""
        said = self.said()
        return (f"of the last answer's {said['answer_uses']} uses of experts {said['answer_from_base']} "
                f"({100 * said['answer_share']:.1f} %) were served from bases")

    def said(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {"allowed": self.share, "uses": self.uses, "from_base": self.taken,
                "share": self.taken / max(1, self.uses), "answer_uses": self.answer_uses,
                "answer_from_base": self.answer_taken,
                "answer_share": self.answer_taken / max(1, self.answer_uses)}


def check_share(share: Any, planes: int) -> float:
    """Return the share of uses that bases may serve, or refuse it.

    Raises
    ------
    ConfigError
        For what is no number from 0 to 1, or more than 0 of a store without planes.
    """
    good = isinstance(share, (int, float)) and not isinstance(share, bool) and isfinite(share)
    if not good or not 0 <= share <= 1:
        raise ConfigError(f"base_share={share!r} is not allowed: it must be a number from 0 to 1, the "
                          f"share of expert uses that bases may serve")
    if share and planes == 1:
        raise ConfigError(f"base_share={share} has no effect: the store has no bases; convert it with "
                          f"planes=2, or leave it out")
    return float(share)
