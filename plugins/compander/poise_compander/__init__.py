"""Weight Compander: a nonlinear reparameterization of every weight (arXiv 2306.16993).

    from poise_compander import WeightCompander
    attached = WeightCompander(a=0.7, b=0.7).attach(model)
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_compander import diagnostics, functions
    from poise_compander.attached import AttachedCompander
    from poise_compander.components import (
        LrMatched,
        PaperCompander,
        PowerPropagation,
        WeightCompander,
        WeightNorm,
    )

_HOMES = {
    "AttachedCompander": "attached",
    **dict.fromkeys(("WeightCompander", "PaperCompander", "LrMatched", "PowerPropagation", "WeightNorm"),
                    "components"),
}
_MODULES = ("diagnostics", "functions")
__all__ = ["AttachedCompander", "LrMatched", "PaperCompander", "PowerPropagation", "WeightCompander",
           "WeightNorm", "diagnostics", "functions"]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"poise_compander.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'poise_compander' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise_compander.{_HOMES[name]}"), name)
