"""How often a cache will hit: every policy at some sizes, and what recorded models show."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from poise_edgemoe.cache.belady import Belady
from poise_edgemoe.cache.policies import POLICIES, PREDICTED, make_policy, options_of
from poise_edgemoe.cache.policy import Key, Policy
from poise_edgemoe.cache.simulator import simulate
from poise_edgemoe.cache.traces import RoutingTrace

# Hits (%) after the prompt under `expected`, by share of experts that are kept (%): `hits_of` on three
# traces of BigMoeOnEdge, one prompt each (two with fewer experts a token than the model's own). A first use
# never hits, so that short traces end below 100.
SHARES = (1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)
RECORDED = {
    "Qwen3-30B-A3B": (13.0, 22.3, 38.3, 56.1, 77.7, 89.3, 94.1, 96.4, 97.1, 97.1, 97.1, 97.1),
    "gemma-4-26B-A4B": (12.1, 21.9, 39.2, 56.3, 75.3, 85.9, 92.8, 95.7, 96.4, 96.4, 96.4, 96.4),
    "gpt-oss-120b": (16.9, 26.9, 45.3, 60.8, 75.8, 83.3, 87.2, 89.1, 89.1, 89.1, 89.1, 89.1),
}


def likely_hits(share: float) -> tuple[float, float]:
    """Return the least and the most hits to expect, as shares, where a share of the experts is kept.

    Least: experts drawn at random, of which that share is there. Most: the best of three recorded models.
    """
    best = np.max(list(RECORDED.values()), axis=0) / 100
    most = float(np.interp(share, [0, *(s / 100 for s in SHARES)], [0, *best]))
    return share, max(share, most)


def slots_at(trace: RoutingTrace, share: float) -> int:
    """Return how many experts of a trace's model a share of them is."""
    return round(share * trace.layers * trace.experts)


def hits_of(trace: RoutingTrace, slots: int, policy: str = "expected") -> float:
    """Return the share of decode hits of one policy at one size, the prompt replayed first."""
    uses = trace.prompt + trace.decode
    return simulate(uses, slots, policy, warm=len(trace.prompt), pins=True).hit_rate


def hits_of_all(
    trace: RoutingTrace, sizes: Sequence[int], frequencies: Mapping[Key, float] | None = None,
    encoder: Collection[int] = (), advance: Callable[[], None] = lambda: None,
    predicted: Callable[[], Policy] | None = None,
) -> dict[str, list[float | None]]:
    """Return the share of decode hits by policy and size; Belady's optimum is the last.

    Policies pin a layer's experts, and let pass what there is no room for; the optimum pins none, and lets
    pass what is not worth its room: no policy is above it.

    Parameters
    ----------
    sizes : list of int
        Slots.
    frequencies : mapping, optional
        For the policies that start from some; `static` is left out without.
    encoder : list of int
        Layers of an encoder.
    advance : callable
        Called after each simulation.
    predicted : callable, optional
        Makes a policy that asks a predictor.

    Returns
    -------
    dict
        None where a size is too small for a policy: fewer slots than layers that share them.
    """
    uses, found = trace.prompt + trace.decode, {}
    for name in [*POLICIES, PREDICTED, "belady"]:
        if (name == "static" and frequencies is None) or (name == PREDICTED and predicted is None):
            continue
        found[name] = []
        for slots in sizes:
            short = name in POLICIES and POLICIES[name].per_layer and slots < trace.layers
            rate = None
            if not short:
                policy = _made(name, trace, frequencies, encoder) if name != PREDICTED else predicted()  # type: ignore[misc]
                rate = simulate(uses, slots, policy, len(trace.prompt), pins=name != "belady").hit_rate
            found[name].append(rate)
            advance()
    return found


def _made(
    name: str, trace: RoutingTrace, frequencies: Mapping[Key, float] | None, encoder: Collection[int]
) -> Policy:
    if name == Belady.name:
        return Belady(trace.layers, trace.experts, trace.prompt + trace.decode, bypass=True)
    given = {"frequencies": frequencies, "encoder": encoder or None}
    options = {k: v for k, v in given.items() if v is not None and k in options_of(POLICIES[name])}
    return make_policy(name, layers=trace.layers, experts=trace.experts, **options)
