"""The one walk over a model's weights.

All that quantizes, adapts, plans, converts, counts or selects goes through `weights(model)`: it
meets every matrix exactly once, whatever module holds it, and gives it a stable, readable name.
"""

from __future__ import annotations

from poise.walk.checkpoints import checkpoint
from poise.walk.families import FAMILIES
from poise.walk.files import open_others, open_weights
from poise.walk.foreign import dense_linear
from poise.walk.live import (
    choose,
    count,
    covered,
    held,
    matches,
    named_tie,
    refuse_overlap,
    refuse_tied,
    select,
    untied,
    weights,
)
from poise.walk.modules import path_of, replace_module
from poise.walk.plain import has_own_forward
from poise.walk.product import Product
from poise.walk.replacing import replace
from poise.walk.weight import ROLES, Expert, Weight

__all__ = [
    "FAMILIES", "ROLES", "Expert", "Product", "Weight", "checkpoint", "choose", "count", "covered",
    "dense_linear", "has_own_forward", "held", "matches", "named_tie", "open_others", "open_weights",
    "path_of", "refuse_overlap", "refuse_tied", "replace", "replace_module", "select", "untied", "weights",
]
