"""Weight Compander: a nonlinear reparameterization of every weight (arXiv 2306.16993).

    from poise_compander import Compander
    attached = Compander(a=0.7, b=0.7).attach(model)
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_compander.attached import AttachedCompander
    from poise_compander.components import Compander, LrMatched
    from poise_compander.functions import Arctan
    from poise_compander.parametrization import Psi

_HOMES = {
    "Compander": "components", "LrMatched": "components", "AttachedCompander": "attached",
    "Arctan": "functions", "Psi": "parametrization",
}
__all__ = ["Arctan", "AttachedCompander", "Compander", "LrMatched", "Psi"]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise_compander' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise_compander.{_HOMES[name]}"), name)
