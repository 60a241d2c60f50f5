"""How often a cache of experts hits, on a sequence of uses."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral

import numpy as np

from poise.errors import ConfigError, DataError, nearest
from poise_edgemoe.cache.belady import Belady
from poise_edgemoe.cache.policies import DEFAULT_POLICY, POLICIES, make_policy, options_of
from poise_edgemoe.cache.policy import MOST_EXPERTS, Key, Policy

_ANY_KEY = [*(n for n, p in POLICIES.items() if not p.layered), Belady.name]


@dataclass(frozen=True)
class Simulation:
    """Counted uses; `layer_hits` and `layer_misses` by layer, empty where keys have no layer."""

    hits: int
    misses: int
    layer_hits: tuple[int, ...]
    layer_misses: tuple[int, ...]

    @property
    def hit_rate(self) -> float:
        """Return hits / (hits + misses), 0 when nothing was counted."""
        return self.hits / max(self.hits + self.misses, 1)


def simulate(
    trace: Sequence[Hashable], slots: int, policy: str | Policy = DEFAULT_POLICY, warm: int = 0,
    frequencies: Mapping | None = None, pins: bool = False,
) -> Simulation:
    """Count the hits of a cache of `slots` experts that starts empty, over the uses in `trace`.

    Every use that misses takes a slot; when all are taken, the policy's victim leaves. With `slots=0`
    everything misses.

    Parameters
    ----------
    trace
        Keys in the order of their use: (layer, expert), both whole numbers from 0. A token ends where
        the layer number falls, so a prompt that visits each layer's experts in turn is one token, and so
        is a whole trace of one layer. S is the largest layer + 1. `lru`, `lfu`, `static` and `belady` take
        any hashable keys; those that are no pairs have no layer, and of equal ones the first seen leaves
        first where pairs go by layer and index.
    slots
        Places for experts, all of one size. `layer_lru` and `layer_lfu` give each layer slots // S of them.
    policy
        A name of `POLICIES`, or `belady`, the optimum without bypass (it knows the trace). Or a policy of
        one's own making, with an empty cache, for options such as `freq_source` and `encoder`.
    warm
        The first uses, which fill the cache and are not counted.
    frequencies
        {key: uses per token}, what `static` ranks by and the paper's policies start from.
    pins
        What an engine does: the experts of the layer that runs, all those of its token, are known from the
        router, and none of them leaves before the layer is done. (An engine pins guesses for the next layer
        too; here there are none.) A use for which no slot can be freed is a miss that is streamed past the
        cache and not kept: more experts of one layer and token than slots, or than the layer's share.

    Raises
    ------
    ConfigError
        For an unknown policy, keys without layers under a policy that needs them, `slots` or `warm` that
        are no whole number from 0, fewer slots than layers under `layer_*`, `warm` beyond the trace, or
        `static` without `frequencies`.
    DataError
        For a key that cannot be hashed, or layers and experts beyond 4,194,304 in all.
    """
    _check_count("slots", slots)
    _check_count("warm", warm)
    keys = list(trace)
    if warm > len(keys):
        raise ConfigError(f"warm={warm} is beyond the trace, which has {len(keys)} uses: lower warm")
    paired = next((i for i, key in enumerate(keys) if not _is_pair(key)), None)
    _check_policy(policy, keys, paired)
    uses, names = _coded(keys, as_pairs=paired is None)
    shape = (max((i for i, _ in uses), default=0) + 1, max((j for _, j in uses), default=0) + 1)
    chosen = _chosen(policy, uses, names, shape, frequencies)
    hits = _replay(uses, _Slots(chosen, slots), pins)[warm:]
    layers = np.array([i for i, _ in uses[warm:]], dtype=np.int64)
    count = shape[0] if paired is None and uses else 0
    by_layer = [np.bincount(layers[h], minlength=count).tolist()[:count] for h in (hits, ~hits)]
    return Simulation(int(hits.sum()), int((~hits).sum()), tuple(by_layer[0]), tuple(by_layer[1]))


class _Slots:
    """Slots of one size under a policy."""

    def __init__(self, policy: Policy, slots: int):
        self.policy, self.resident = policy, set()
        self.room = slots // policy.layers if policy.per_layer else slots
        if policy.per_layer and self.room == 0:
            raise ConfigError(
                f"slots={slots} are fewer than the {policy.layers} layers that share them under policy "
                f"{policy.name!r}: give at least {policy.layers}"
            )
        self.taken = [0] * policy.layers

    def use(self, key: Key, pinned: set[Key]) -> bool:
        """Use an expert; return whether it was there."""
        self.policy.used(key)
        if key in self.resident:
            return True
        share = key[0] if self.policy.per_layer else 0
        if self.taken[share] == self.room:
            gone = self.policy.victim(key, pinned)
            if gone is None:
                return False
            self.resident.remove(gone)
            self.policy.removed(gone)
            self.taken[share] -= 1
        self.resident.add(key)
        self.policy.added(key)
        self.taken[share] += 1
        return False


def _replay(uses: list[Key], slots: _Slots, pins: bool) -> np.ndarray:
    """Return for each use whether it hit."""
    hits = []
    for falls, group in _groups(uses):
        if falls:
            slots.policy.next_token()
        pinned = set(group) if pins else set()
        hits += [slots.use(key, pinned) for key in group]
    return np.array(hits, dtype=bool)


def _groups(uses: list[Key]) -> Iterator[tuple[bool, list[Key]]]:
    """Yield the uses of one layer and token together, and whether a token ended before them."""
    before = -1
    for layer, group in groupby(uses, key=lambda key: key[0]):
        yield layer < before, list(group)
        before = layer


def _chosen(
    policy: str | Policy, uses: list[Key], names: dict, shape: tuple[int, int], frequencies: Mapping | None
) -> Policy:
    """Return the policy to ask, for keys as they are coded."""
    if isinstance(policy, Policy):
        if frequencies is not None:
            raise ConfigError("frequencies beside a policy that is already made: give them to make_policy")
        if policy.resident():
            raise ConfigError(f"policy {policy.name!r} has experts in its cache already: make a new one")
        if shape[0] > policy.layers or shape[1] > policy.experts:
            raise ConfigError(f"the trace has {shape[0]} layers of {shape[1]} experts, the policy was "
                              f"made for {policy.layers} of {policy.experts}")
        return policy
    if policy == Belady.name:
        return Belady(*shape, future=uses)
    options = {}
    if frequencies is not None and not isinstance(frequencies, Mapping):
        raise ConfigError(f"frequencies={frequencies!r}: needs a mapping of keys to uses per token")
    if frequencies is not None and "frequencies" in options_of(POLICIES[policy]):
        options["frequencies"] = {names[k]: v for k, v in frequencies.items() if k in names}
    return make_policy(policy, layers=shape[0], experts=shape[1], **options)


def _check_policy(policy: str | Policy, keys: list, unpaired: int | None) -> None:
    """Refuse a policy that is not known, or that needs layers where a key has none."""
    if not isinstance(policy, Policy) and policy not in (known := [*POLICIES, Belady.name]):
        raise ConfigError(f"policy={policy!r} is none of {', '.join(known)}{nearest(policy, known)}")
    made = isinstance(policy, Policy)
    if unpaired is not None and (made or policy not in _ANY_KEY):
        raise ConfigError(
            f"trace[{unpaired}] is {keys[unpaired]!r}: policy {policy.name if made else policy!r} needs "
            f"keys (layer, expert), whole numbers from 0; by name, {', '.join(_ANY_KEY)} take any"
        )


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name}={value!r}: needs a whole number from 0")


def _is_pair(key: Hashable) -> bool:
    return isinstance(key, tuple) and len(key) == 2 and all(
        isinstance(k, Integral) and not isinstance(k, bool) and int(k) >= 0 for k in key
    )


def _coded(keys: list, as_pairs: bool) -> tuple[list[Key], dict]:
    """Return the uses as (layer, expert), and which pair each key has become."""
    names: dict = {}
    for i, key in enumerate(keys):
        try:
            names.setdefault(key, (int(key[0]), int(key[1])) if as_pairs else (0, len(names)))
        except TypeError:
            raise DataError(f"trace[{i}] is {key!r}, without a hash: use tuples (layer, expert)") from None
    if as_pairs and keys:
        layers, experts = (1 + max(pair[k] for pair in names.values()) for k in (0, 1))
        if layers * experts > MOST_EXPERTS:
            raise DataError(f"the trace has {layers} layers of {experts} experts: at most {MOST_EXPERTS}")
    return [names[key] for key in keys], names
