"""The ways that are compared: which store each reads, what stays in memory, what is read ahead.

Source: EdgeMoE section IV-A (baselines), Fig. 18 (`+Q`, `+Q+P`: the paper's own, part by part).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poise.errors import ConfigError
from poise_edgemoe.baselines import budget_of, open_baseline
from poise_edgemoe.budget import Budget, plan_memory
from poise_edgemoe.cache import DEFAULT_POLICY, Policy, policy_for
from poise_edgemoe.cache.policy import Key
from poise_edgemoe.cache.slots import STAGES, size_of
from poise_edgemoe.engine import Engine
from poise_edgemoe.predictors import FromRouting
from poise_edgemoe.store.index import Index, read_index

STORES = ("raw", "int8", "int4", "paper", "ours")  # as trained, uniform, by the paper's plan, by ours
PAPER = ("paper_intent", "paper_literal")


@dataclass(frozen=True)
class Way:
    """One way to run a model.

    Parameters
    ----------
    store : str
        One of `STORES`.
    limited : bool
        Whether it is run at every limit, or once, as its definition says what it keeps.
    baseline : str
        As `open_baseline` has it; empty: an engine with a policy and a source of guesses.
    policy : str
        Who leaves; "best": what simulation says.
    source : "none", "table" or "auto"
        Who guesses: nobody, the paper's table of two layers, what is best for each layer.
    """

    name: str
    store: str
    limited: bool
    baseline: str = ""
    policy: str = DEFAULT_POLICY
    source: str = "none"


WAYS = (
    Way("IO-FREE", "raw", False, "IO-FREE"),
    Way("IO-QFREE", "int8", False, "IO-QFREE"),
    Way("IO-EXP", "raw", False, "IO-EXP"),
    Way("IO-QEXP", "int4", False, "IO-QEXP"),
    Way("+Q", "paper", False, "IO-QEXP"),
    Way("+Q+P", "paper", False, policy="lru", source="table"),
    Way("IO-EXP at M", "raw", True, "IO-EXP"),
    Way("IO-QEXP at M", "int4", True, "IO-QEXP"),
    Way("STI-like", "int4", True, "STI"),
    Way("EdgeMoE", "paper", True, policy="paper_intent", source="table"),
    Way("EdgeMoE as printed", "paper", True, policy="paper_literal", source="table"),
    Way("ours", "ours", True, policy="best", source="auto"),
)
BY_NAME = {way.name: way for way in WAYS}


@dataclass(frozen=True)
class Known:
    """What is known of a model's routing before it runs.

    Parameters
    ----------
    sources : dict of FromRouting
        "table" and "auto".
    frequencies : dict
        Uses per token of each expert.
    policies : dict
        Limit to the policy that simulation prefers.
    """

    sources: dict[str, FromRouting]
    frequencies: dict[Key, float]
    policies: dict[int, str]


def memory_at(limit: int, store: Path, context: int) -> int:
    """Return the bytes that a limit is: all but experts, and so many percent of all experts of a store."""
    whole = plan_memory(store, context=context)
    every = whole.experts - whole.staging
    return whole.total - every + every * limit // 100


def open_way(
    way: Way, store: Path, memory: int | None, context: int, known: Known, limit: int | None
) -> Engine:
    """Open a store as a way runs it.

    Raises
    ------
    ConfigError
        For too little memory.
    """
    if way.baseline:
        return open_baseline(way.baseline, store, memory=memory, context=context)
    index = read_index(store)
    source: Any = "none" if way.source == "none" else known.sources[way.source]
    learned = 0 if way.source == "none" else source.nbytes
    if memory is None:  # of the part with guesses alone: a layer's experts, and as many that are guessed
        budget = _two_layers(store, index, context, learned)
    else:
        budget = budget_of(store, index, 1, memory, context, learned=learned)
    return Engine(store, budget, _policy(way, index, known, limit, source), prefetch=source)


def _two_layers(store: Path, index: Index, context: int, learned: int) -> Budget:
    whole = plan_memory(store, context=context, learned=learned)
    largest = max(size_of(m) for _, _, m in index.blobs())
    kept = STAGES + 2 * top_of(store)
    return replace(whole, experts=min(whole.experts, kept * largest))


def top_of(store: Path) -> int:
    """Return how many experts a token uses in a layer."""
    from poise_edgemoe.loading import read_config

    return getattr(read_config(store), "num_experts_per_tok", 1)


def _policy(way: Way, index: Index, known: Known, limit: int | None, source: Any) -> str | Policy:
    name = way.policy
    if name == "best":
        assert limit is not None
        name = known.policies[limit]
    if name == "predicted":
        return source.policy()
    return policy_for(index, name, frequencies=known.frequencies) if name in PAPER else name


def too_small(error: ConfigError) -> bool:
    """Return whether an engine was refused for want of memory."""
    return "is too small" in str(error)
