"""EdgeMoE: mixture-of-experts language models whose experts live in mixed bitwidths
(arXiv 2308.14352). This first slice holds a small trained model, plans and their losses; no engine.

    from poise_edgemoe import ByteMoE, half_plan
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_edgemoe.allocate import expert_errors, half_plan, random_plan, uniform_plan
    from poise_edgemoe.components import ByteMoE, EdgeMoEBits

_HOMES = {
    "ByteMoE": "components", "EdgeMoEBits": "components", "expert_errors": "allocate",
    "half_plan": "allocate", "random_plan": "allocate", "uniform_plan": "allocate",
}
__all__ = ["ByteMoE", "EdgeMoEBits", "expert_errors", "half_plan", "random_plan", "uniform_plan"]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise_edgemoe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise_edgemoe.{_HOMES[name]}"), name)
