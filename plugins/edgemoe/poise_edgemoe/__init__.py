"""EdgeMoE: mixture-of-experts language models whose experts live in mixed bitwidths
(arXiv 2308.14352), and are read from disk under a memory limit.

    from poise_edgemoe import Engine, convert
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_edgemoe.components import ByteMoE, EdgeMoEBits, EdgeMoEGenerate, EdgeMoEStore
    from poise_edgemoe.engine import Engine
    from poise_edgemoe.split import split_feed_forward
    from poise_edgemoe.store.writer import convert
    from poise_edgemoe.tuning.components import EdgeMoEStreamed, EdgeMoETuneAndServe
    from poise_edgemoe.tuning.model import open_streamed
    from poise_edgemoe.widths.allocating import allocate
    from poise_edgemoe.widths.plan import load_plan
    from poise_edgemoe.widths.plans import expert_errors, half_plan, random_plan, uniform_plan
    from poise_edgemoe.widths.profile_file import load_profile
    from poise_edgemoe.widths.profiling import profile

_HOMES = {
    "ByteMoE": "components", "EdgeMoEBits": "components", "EdgeMoEGenerate": "components",
    "EdgeMoEStore": "components", "expert_errors": "widths.plans",
    "half_plan": "widths.plans", "random_plan": "widths.plans", "uniform_plan": "widths.plans",
    "Engine": "engine", "convert": "store.writer", "split_feed_forward": "split",
    "EdgeMoEStreamed": "tuning.components", "EdgeMoETuneAndServe": "tuning.components",
    "open_streamed": "tuning.model",
    "profile": "widths.profiling", "load_profile": "widths.profile_file",
    "allocate": "widths.allocating", "load_plan": "widths.plan",
}
__all__ = ["ByteMoE", "EdgeMoEBits", "EdgeMoEGenerate", "EdgeMoEStore", "EdgeMoEStreamed",
           "EdgeMoETuneAndServe", "Engine", "allocate", "convert", "expert_errors", "half_plan",
           "load_plan", "load_profile", "open_streamed", "profile", "random_plan", "split_feed_forward",
           "uniform_plan"]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise_edgemoe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise_edgemoe.{_HOMES[name]}"), name)
