"""What all components share: a check of the options when one is made, and options of the same words."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from poise.errors import ConfigError
from poise.options import check_options, option

LEVELS = [k / 100 for k in range(1, 100)]  # the paper's grid
LEVELS_HELP = "quantile levels, increasing"


def seed_option() -> Any:
    """Return the option `random_state`."""
    return option(0, "seed of the model's own randomness", low=0, high=2**32 - 1)


class Checked:
    """Check the options, and that levels increase, when a component is made."""

    def __post_init__(self) -> None:
        check_options(self)
        levels = getattr(self, "levels", None)
        if levels is not None and (not levels or any(a >= b for a, b in pairwise(levels))):
            raise ConfigError(
                f"{type(self).__name__}.levels={levels!r} is not allowed: give at least one level, "
                f"in increasing order"
            )
