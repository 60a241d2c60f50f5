"""The simulator of an expert cache and Belady's optimum."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError, DataError
from poise_edgemoe.cache import POLICIES, Simulation, make_policy, simulate

PAGES = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]  # the textbook's string, 3 frames
EVERY = [*POLICIES, "belady"]
keys = st.tuples(st.integers(0, 2), st.integers(0, 3))
traces = st.lists(keys, min_size=1, max_size=50)


def run(trace, slots, policy, **options):
    frequencies = {key: 1 / (2 + key[1]) for key in trace} if policy == "static" else None
    return simulate(trace, slots, policy, frequencies=frequencies, **options)


def best(trace, slots):
    """Return the most hits that any choice of victims gives, by trying all."""
    states = {frozenset(): 0}
    for key in trace:
        after: dict = {}
        for held, hits in states.items():
            if key in held:
                choices = {held: hits + 1}
            elif len(held) < slots:
                choices = {held | {key}: hits}
            else:
                choices = {held - {gone} | {key}: hits for gone in held}
            for state, count in choices.items():
                after[state] = max(count, after.get(state, 0))
        states = after
    return max(states.values())


def test_the_textbooks_string_of_pages():
    assert [simulate(PAGES, 3, p).misses for p in ("belady", "lru")] == [9, 12]
    assert simulate([(0, p) for p in PAGES], 3, "belady").misses == 9


@settings(max_examples=150)
@given(trace=st.lists(st.integers(0, 5), max_size=12), slots=st.integers(1, 4))
def test_the_optimum_is_the_best_of_all_choices(trace, slots):
    assert simulate(trace, slots, "belady").hits == best(trace, slots)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=50)
@given(trace=traces, slots=st.integers(3, 13), warm=st.integers(0, 10))
def test_no_policy_beats_the_optimum(policy, trace, slots, warm):
    assert run(trace, slots, policy).hits <= simulate(trace, slots, "belady").hits
    counted = run(trace, slots, policy, warm=min(warm, len(trace)))
    assert counted.hits + counted.misses == max(len(trace) - warm, 0)
    assert run(trace, slots, policy) == run(trace, slots, policy)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=30)
@given(trace=traces, slots=st.integers(4, 13))
def test_no_policy_beats_the_optimum_with_pins_either_where_every_layer_fits(policy, trace, slots):
    trace = [key for i, key in enumerate(trace) if i == 0 or key[0] != trace[i - 1][0]]  # one a layer
    assert run(trace, slots, policy, pins=True).hits <= simulate(trace, slots, "belady").hits


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("pins", [False, True])
@settings(max_examples=20)
@given(trace=traces)
def test_with_room_for_all_each_expert_misses_once(policy, pins, trace):
    slots = 12 if not policy.startswith("layer_") else 4 * (1 + max(i for i, _ in trace))
    assert run(trace, slots, policy, pins=pins).misses == len(set(trace))


@settings(max_examples=60)
@given(trace=traces)
def test_lru_never_hits_less_with_more_room(trace):
    hits = [simulate(trace, slots, "lru").hits for slots in range(13)]
    assert hits == sorted(hits)


@pytest.mark.parametrize("policy", EVERY)
def test_without_slots_everything_misses_where_that_can_be(policy):
    trace = [(0, 1), (0, 1), (0, 2)]
    if policy.startswith("layer_"):
        with pytest.raises(ConfigError, match="give at least 1"):
            run(trace, 0, policy)
    else:
        assert (run(trace, 0, policy).hits, run(trace, 0, policy).misses) == (0, 3)


def test_counts_by_layer_and_what_is_not_counted():
    trace = [(0, 0), (1, 0), (0, 0), (1, 1), (0, 0), (1, 1)]
    found = simulate(trace, 3, "lru", warm=2)
    assert found == Simulation(3, 1, (2, 1), (0, 1)) and found.hit_rate == 0.75
    with pytest.raises(FrozenInstanceError):
        found.hits = 4  # type: ignore[misc]
    assert simulate(trace, 3, "lru", warm=6) == Simulation(0, 0, (0, 0), (0, 0))
    assert simulate([], 3, "expected") == Simulation(0, 0, (), ()) and simulate([], 3, "lru").hit_rate == 0
    assert simulate("abcab", 2, "lru") == Simulation(0, 5, (), ())
    assert simulate("abcab", 3, "belady").hits == 2


def test_numpys_numbers_are_numbers():
    trace = [tuple(row) for row in np.array([[0, 0], [1, 1], [0, 0]])]
    assert simulate(trace, np.int64(2), "expected").hits == 1  # type: ignore[arg-type]


def test_a_token_ends_where_the_layer_falls():
    """Two uses in one token count twice at once; in two tokens the first is decayed."""
    seen = []

    class Spy(POLICIES["lru"]):
        def next_token(self):
            seen.append(self._time)
            super().next_token()

    simulate([(0, 0), (0, 1), (2, 0), (2, 1), (0, 0), (1, 0), (1, 1), (0, 0)], 4, Spy(3, 2))
    assert seen == [4, 7]


def test_pins_hold_the_experts_of_the_layer_that_runs():
    """Two slots, a layer of two experts: unpinned, LRU throws out the one that is about to be used."""
    trace = [(0, 0), (1, 0), (0, 1), (0, 0)]  # the last two are one layer of one token
    assert simulate(trace, 2, "lru").hits == 0
    assert simulate(trace, 2, "lru", pins=True).hits == 1


def test_a_layer_that_does_not_fit_is_streamed_past_the_cache():
    trace = [(0, j) for j in range(5)] + [(1, 0)] + [(0, j) for j in range(5)]
    found = simulate(trace, 3, "lru", pins=True)  # kept: 0, 1, 2; (1, 0) takes the place of 0
    assert (found.layer_hits, found.layer_misses) == ((2, 0), (8, 1))
    shares = simulate(trace, 4, "layer_lru", pins=True)  # two slots for each layer
    assert (shares.layer_hits, shares.layer_misses) == ((2, 0), (8, 1))


@pytest.mark.parametrize("name", ["layer_lru", "layer_lfu"])
def test_each_layer_has_equal_room(name):
    trace = [(0, 0), (0, 1), (1, 0), (0, 0), (0, 1), (1, 0)]  # 4 slots: two for each
    assert simulate(trace, 4, name).hits == 3
    assert simulate(trace, 3, name).hits == 1  # one for each, one unused
    with pytest.raises(ConfigError, match=r"slots=1 are fewer than the 2 layers .*give at least 2"):
        simulate(trace, 1, name)


def test_static_keeps_what_was_often_used_elsewhere():
    often = {(0, 0): 0.9, (0, 1): 0.1, (0, 2): 0.5, (5, 5): 1}  # the last is not in the trace
    trace = [(0, 0), (0, 1), (0, 2), (0, 0), (0, 2), (0, 1), (0, 0)]
    assert simulate(trace, 2, "static", frequencies=often).hits == 3
    assert simulate([k[1] for k in trace], 2, "static", frequencies={0: 0.9, 1: 0.1, 2: 0.5}).hits == 3


@pytest.mark.parametrize(("given", "told"), [
    ({"slots": -1}, "slots=-1: needs a whole number from 0"),
    ({"slots": 2.0}, "slots=2.0"),
    ({"slots": True}, "slots=True"),
    ({"slots": None}, "slots=None"),
    ({"warm": -1}, "warm=-1"),
    ({"warm": 4}, "warm=4 is beyond the trace, which has 3 uses"),
    ({"policy": "lfru"}, "did you mean"),
    ({"policy": 7}, "policy=7 is none of"),
    ({"policy": "static"}, "needs frequencies"),
    ({"policy": "static", "frequencies": [1]}, "needs a mapping"),
    ({"policy": "static", "frequencies": {(0, 0): float("nan")}}, "not finite"),
    ({"trace": ["a", (0, 1)], "policy": "expected"}, "trace[0] is 'a': policy 'expected' needs keys"),
    ({"trace": [(0, 1), (-1, 1)], "policy": "layer_lfu"}, "trace[1] is (-1, 1)"),
    ({"trace": [(0, 1.0)], "policy": "fld_lru"}, "trace[0] is (0, 1.0)"),
    ({"policy": make_policy("lru", layers=1, experts=2)}, "the policy was made for 1 of 2"),
    ({"policy": make_policy("lru", layers=2, experts=2), "frequencies": {}}, "give them to make_policy"),
])
def test_wrong_calls_are_told_in_a_line(given, told):
    call = {"trace": [(0, 0), (1, 1), (0, 0)], "slots": 2, "policy": "lru"} | given
    with pytest.raises(ConfigError) as caught:
        simulate(**call)
    assert told in str(caught.value)


def test_a_policy_serves_one_cache():
    policy = make_policy("lru", layers=1, experts=2)
    simulate([(0, 0)], 1, policy)
    with pytest.raises(ConfigError, match="in its cache already"):
        simulate([(0, 0)], 1, policy)


@pytest.mark.parametrize("trace", [[[0, 1]], [(10**7, 0)], [(0, 0), (0, 10**12)]])
def test_keys_that_cannot_be_held_are_refused(trace):
    with pytest.raises(DataError):
        simulate(trace, 2, "lru")
