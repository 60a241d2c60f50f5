"""Which experts stay in memory: eviction policies, a simulator, Belady's optimum, traces of routing. NumPy.

    from poise_edgemoe.cache import read_trace, simulate
    trace = read_trace("qwen.route.csv.gz")
    simulate(trace.prompt + trace.decode, 600, "expected", warm=len(trace.prompt)).hit_rate
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_edgemoe.cache.belady import Belady
    from poise_edgemoe.cache.choosing import policy_for, read_frequencies, write_frequencies
    from poise_edgemoe.cache.policies import DEFAULT_POLICY, POLICIES, make_policy
    from poise_edgemoe.cache.policy import Policy
    from poise_edgemoe.cache.simulator import Simulation, simulate
    from poise_edgemoe.cache.traces import RoutingTrace, read_trace, write_trace

_HOMES = {
    "DEFAULT_POLICY": "policies", "POLICIES": "policies", "make_policy": "policies", "Policy": "policy",
    "Belady": "belady", "Simulation": "simulator", "simulate": "simulator",
    "RoutingTrace": "traces", "read_trace": "traces",
    "write_trace": "traces",
    "policy_for": "choosing", "read_frequencies": "choosing", "write_frequencies": "choosing",
}
__all__ = [
    "DEFAULT_POLICY", "POLICIES", "Belady", "Policy", "RoutingTrace", "Simulation", "make_policy",
    "policy_for", "read_frequencies", "read_trace", "simulate", "write_frequencies", "write_trace",
]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise_edgemoe.cache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise_edgemoe.cache.{_HOMES[name]}"), name)
