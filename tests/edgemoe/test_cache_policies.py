"""Eviction policies of the expert cache: against plain loops, by hand, and as an engine calls them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError
from poise_edgemoe.cache import DEFAULT_POLICY, POLICIES, make_policy, simulate
from poise_edgemoe.cache.policies import PaperIntent

NEEDS = {"static"}
PAPER = {"paper_literal", "paper_intent"}
LAYERED = [n for n, p in POLICIES.items() if p.layered]


class Loops:
    """Every policy as the specification words it, in dictionaries and loops."""

    def __init__(self, name: str, S: int, frequencies: dict):
        self.name, self.S, self.now = name, S, 0
        self.resident: set = set()
        self.last: dict = {}
        self.time = self.began = 0
        self.count: dict = {}
        self.frequency = dict(frequencies)
        self.rate = dict(frequencies) if name in PAPER else {}
        self.kept = 0.5 ** (1 / (256 if name in PAPER else 16))

    def used(self, key):
        if key[0] != self.now:
            self.now, self.began = key[0], self.time
        self.stamp(key)
        self.count[key] = self.count.get(key, 0) + 1
        self.rate[key] = self.rate.get(key, 0.0) + (1 - self.kept)

    def stamp(self, key):
        self.time += 1
        self.last[key] = self.time

    def added(self, key):
        self.resident.add(key)
        if self.last.get(key, 0) <= self.began:
            self.stamp(key)

    def removed(self, key):
        self.resident.remove(key)

    def next_token(self):
        self.began = self.time
        for key in self.rate:
            self.rate[key] *= self.kept

    def score(self, key):
        ahead, behind = (key[0] - self.now) % self.S or self.S, (self.now - key[0]) % self.S or self.S
        match self.name:
            case "lru" | "layer_lru":
                return -self.last[key]
            case "lfu" | "layer_lfu":
                return -self.count.get(key, 0)
            case "static":
                return -self.frequency.get(key, 0)
            case "fld_lru":
                return ahead
            case "expected":
                return ahead + self.S * (1 / max(self.rate.get(key, 0.0), 1e-4) - 1)
            case "paper_literal":
                return -self.rate.get(key, 0.0) / behind
            case "paper_intent":
                return -self.rate.get(key, 0.0) / ahead
        raise AssertionError(self.name)

    def victim(self, key, pinned=()):
        best = None
        for one in self.resident:
            if one in pinned or (self.name.startswith("layer_") and one[0] != key[0]):
                continue
            rank = (self.score(one), -self.last[one], -one[0], -one[1])
            if best is None or rank > best[0]:
                best = (rank, one)
        return best[1] if best else None


def drive(policy, trace, slots, layers, pinned_at=None, ahead=None):
    """Use a policy as an engine does, with guesses that are read ahead; return hits and victims."""
    share = slots // layers if getattr(policy, "per_layer", policy.name.startswith("layer_")) else slots
    split = share != slots or policy.name.startswith("layer_")
    resident: set = set()
    hits, victims, before = [], [], -1

    def bring(key, pinned):
        rivals = [k for k in resident if not split or k[0] == key[0]]
        if len(rivals) >= share:
            victims.append(gone := policy.victim(key, pinned))
            if gone is None:
                return
            resident.remove(gone)
            policy.removed(gone)
        resident.add(key)
        policy.added(key)

    for at, key in enumerate(trace):
        if key[0] < before:
            policy.next_token()
        before = key[0]
        pinned = (pinned_at or {}).get(at, set())
        policy.used(key)
        hits.append(key in resident)
        if key not in resident:
            bring(key, pinned)
        guess = (ahead or {}).get(at)
        if guess is not None and guess not in resident:
            bring(guess, pinned | {key})
    return hits, victims


keys = st.tuples(st.integers(0, 3), st.integers(0, 4))
traces = st.lists(keys, min_size=1, max_size=60)
routed = st.lists(  # tokens that visit the layers in order
    st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=2), min_size=4, max_size=4),
    min_size=1, max_size=12,
).map(lambda tokens: [(i, j) for token in tokens for i, group in enumerate(token) for j in sorted(group)])
rates = st.dictionaries(keys, st.sampled_from([0.0, 0.1, 0.25, 1.0]), max_size=20)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60)
@given(
    trace=st.one_of(traces, routed), slots=st.integers(4, 18), frequencies=rates,
    pinned=st.dictionaries(st.integers(0, 59), st.sets(keys, max_size=6), max_size=20),
    ahead=st.dictionaries(st.integers(0, 59), keys, max_size=10),
)
def test_each_policy_evicts_exactly_whom_plain_loops_evict(name, trace, slots, frequencies, pinned, ahead):
    options = {"frequencies": frequencies} if name in NEEDS | PAPER else {}
    fast = make_policy(name, layers=4, experts=5, **options)
    slow = Loops(name, 4, frequencies)
    told = drive(fast, trace, slots, 4, pinned, ahead)
    assert told == drive(slow, trace, slots, 4, pinned, ahead)
    assert set(fast.resident()) == slow.resident


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(trace=routed, slots=st.integers(4, 18), frequencies=rates)
def test_the_simulator_counts_what_a_loop_of_ones_own_counts(name, trace, slots, frequencies):
    trace = [*trace, (3, 4)]  # S and the number of experts are the same for both
    options = {"frequencies": frequencies} if name in NEEDS | PAPER else {}
    policy = make_policy(name, layers=4, experts=5, **options)
    hits, _ = drive(policy, trace, slots, 4)
    assert simulate(trace, slots, name, frequencies=frequencies).hits == sum(hits)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(trace=routed, slots=st.integers(4, 18), frequencies=rates, backwards=st.booleans())
def test_an_engine_that_asks_for_a_whole_layer_first_hits_as_often_as_the_simulator(
    name, trace, slots, frequencies, backwards
):
    """T21: uses of a layer noted all at once, places taken in any order, bytes instead of slots."""
    options = {"frequencies": frequencies} if name in NEEDS | PAPER else {}
    policy, same = (make_policy(name, layers=4, experts=5, **options) for _ in range(2))
    size, resident, hits = 7, set(), 0
    budget = (slots // 4 if policy.per_layer else slots) * size
    groups: list[list] = []
    for key in trace:
        if groups and groups[-1][0][0] == key[0]:
            groups[-1].append(key)
        else:
            groups.append([key])
    for before, group in zip([groups[0], *groups], groups):
        if group[0][0] < before[0][0]:
            policy.next_token()
        for key in group:
            policy.used(key)
        hits += sum(key in resident for key in group)
        missing = [key for key in group if key not in resident]
        streams = len(group) * size > budget  # then the order matters: who takes the last place
        for key in reversed(missing) if backwards and not streams else missing:
            rivals = [k for k in resident if not policy.per_layer or k[0] == key[0]]
            while (len(rivals) + 1) * size > budget and (gone := policy.victim(key, pinned=group)):
                rivals.remove(gone)
                resident.remove(gone)
                policy.removed(gone)
            if (len(rivals) + 1) * size <= budget:
                resident.add(key)
                policy.added(key)
    assert simulate(trace, slots, same, pins=True).hits == hits


def filled(name, layers=4, experts=1, **options):
    """Return a policy with all experts resident, used layer by layer in one token."""
    policy = make_policy(name, layers=layers, experts=experts, **options)
    for i in range(layers):
        for j in range(experts):
            policy.used((i, j))
            policy.added((i, j))
    return policy


def order(policy, now):
    """Return in which order residents leave while layer `now` runs."""
    policy.next_token()
    policy.used((now, 0))
    gone = []
    while (victim := policy.victim((now, 0))) is not None:
        gone.append(victim)
        policy.removed(victim)
    return gone


def test_the_two_readings_of_the_formula_on_a_scan_by_hand():
    """S = 4, layer 1 runs, f = 1: printed d of layers 0 to 3 is 1, 4, 3, 2, the prose's is 3, 4, 1, 2."""
    ones = {(i, 0): 1.0 for i in range(4)}
    with np.errstate(all="raise"):  # i = I does not divide by zero
        literal = order(filled("paper_literal", frequencies=ones, freq_source="offline"), now=1)
        intent = order(filled("paper_intent", frequencies=ones, freq_source="offline"), now=1)
    assert [i for i, _ in literal] == [1, 2, 3, 0]  # after the current layer, the next one: wrong
    assert [i for i, _ in intent] == [1, 0, 3, 2]


def test_the_two_readings_on_a_cyclic_scan_with_room_for_three_of_four_layers():
    """By hand: the intent evicts the layer just left (2 of 3 hit), the printed one the next to run."""
    ones = {(i, 0): 1.0 for i in range(4)}
    trace = [(i, 0) for _ in range(4) for i in range(4)]
    options = {"layers": 4, "experts": 1, "frequencies": ones, "freq_source": "offline"}
    counted = {name: simulate(trace, 3, make_policy(name, **options)).hits for name in PAPER}
    assert counted == {"paper_literal": 0, "paper_intent": 8}
    assert simulate(trace, 3, "belady").hits == 8
    assert simulate(trace, 3, "lru").hits == 0


@pytest.mark.parametrize("name", ["paper_literal", "paper_intent", "expected", "fld_lru"])
def test_experts_of_the_encoder_leave_first_and_do_not_count_as_layers(name):
    policy = filled(name, layers=6, encoder={0, 1})
    assert policy.S == 4  # type: ignore[attr-defined]
    policy.next_token()
    for _ in range(3):
        policy.used((0, 0))  # the encoder's is the most recent, and the most frequent
        policy.used((4, 0))
    assert {policy.victim((4, 0)), policy.victim((4, 0), pinned=[(1, 0)])} == {(1, 0), (0, 0)}
    plain = filled(name, layers=4)
    plain.next_token()
    for _ in range(3):
        plain.used((2, 0))
    for gone in [(0, 0), (1, 0)]:
        policy.removed(gone)
    while (expected := plain.victim((2, 0))) is not None:
        assert policy.victim((4, 0)) == (expected[0] + 2, expected[1])
        policy.removed((expected[0] + 2, 0))
        plain.removed(expected)


def test_experts_of_the_encoder_leave_before_decoder_experts_that_have_f_0_too():
    policy = make_policy("paper_intent", layers=2, experts=1, encoder=[0])
    policy.added((1, 0))  # the least recently used, f = 0
    policy.used((0, 0))
    policy.added((0, 0))
    assert policy.victim((1, 0)) == (0, 0)


def test_the_expected_time_to_the_next_use():
    """d + S (1/p - 1): p counts a use at once, halves in 16 tokens, and is 1e-4 at least."""
    policy = make_policy("expected", layers=4, experts=2)
    policy.used((1, 0))
    p = 1 - 0.5 ** (1 / 16)
    assert policy.scores()[1, 0] == pytest.approx(4 + 4 * (1 / p - 1))  # the current layer: d = S
    assert policy.scores()[0, 1] == pytest.approx(3 + 4 * (1e4 - 1))
    for _ in range(16):
        policy.next_token()
    assert policy.scores()[1, 0] == pytest.approx(4 + 4 * (2 / p - 1))
    policy.used((3, 0))
    assert policy.scores()[1, 0] == pytest.approx(2 + 4 * (2 / p - 1))
    for _ in range(400):
        policy.used((3, 0))
        policy.next_token()
    assert policy.scores()[3, 0] == pytest.approx(4 + 4 * (2 ** (1 / 16) - 1))  # p is near 1


def test_where_the_papers_frequency_comes_from():
    def f(source, frequencies, tokens):
        policy = PaperIntent(1, 2, frequencies, source)
        for _ in range(tokens):
            policy.used((0, 1))
            policy.next_token()
        return (-policy.scores()[0]).tolist()  # S = d = 1

    prior, kept = {(0, 0): 0.5}, 0.5 ** (1 / 256)
    assert f("offline", prior, 256) == [0.5, 0]
    assert f("online", prior, 256) == pytest.approx([0, kept * 0.5])
    assert f("mixed", prior, 256) == pytest.approx([0.25, kept * 0.5])
    assert f("mixed", None, 256) == pytest.approx([0, kept * 0.5])


def test_static_evicts_the_lowest_given_frequency_whatever_is_used():
    policy = filled("static", layers=2, experts=2, frequencies=np.array([[0.3, 0.1], [0.2, 0.4]]))
    for _ in range(9):
        policy.used((0, 1))
    assert [order(policy, 0)] == [[(0, 1), (1, 0), (0, 0), (1, 1)]]


def test_ties_go_by_recency_then_layer_then_index():
    policy = filled("lfu", layers=2, experts=2)  # all used once, (0, 0) first
    policy.used((0, 0))
    policy.used((1, 1))
    assert policy.victim((0, 0)) == (0, 1)
    policy.removed((0, 1))
    assert policy.victim((0, 0)) == (1, 0)
    static = make_policy("static", layers=2, experts=2, frequencies={})
    for key in [(1, 1), (1, 0), (0, 1)]:
        static._resident[key] = True  # never used: no recency
    assert static.victim((0, 0)) == (0, 1)
    static.removed((0, 1))
    assert static.victim((0, 0)) == (1, 0)


@pytest.mark.parametrize("name", POLICIES)
def test_who_is_pinned_stays(name):
    options = {"frequencies": {}} if name in NEEDS else {}
    policy = filled(name, layers=3, experts=3, **options)
    everyone = policy.resident()
    assert policy.victim((1, 0), pinned=everyone) is None
    for free in [k for k in everyone if k[0] == 1]:
        assert policy.victim((1, 0), pinned=set(everyone) - {free}) == free
    assert make_policy(name, layers=3, experts=3, **options).victim((1, 0)) is None


@pytest.mark.parametrize("name", ["lru", "expected", "fld_lru"])
def test_an_expert_read_ahead_counts_as_recent(name):
    policy = filled(name, layers=2, experts=2)
    policy.removed((0, 0))
    policy.next_token()
    policy.used((1, 0))
    policy.used((1, 1))
    policy.added((0, 0))  # a guess, last used before (0, 1)
    assert policy.victim((0, 0), pinned=[(1, 0), (1, 1)]) == (0, 1)


def test_a_guess_counts_as_recent_in_the_next_token_of_a_model_of_one_layer_too():
    policy = filled("lru", layers=1, experts=2)
    policy.removed((0, 0))
    policy.next_token()
    policy.added((0, 0))
    assert policy.victim((0, 0)) == (0, 1)


def two(name, **options):
    """Return a policy for two layers of two experts."""
    return make_policy(name, layers=2, experts=2, **options)


@pytest.mark.parametrize(("made", "told"), [
    (lambda: two("expcted"), "did you mean 'expected'"),
    (lambda: two("belady"), "policy='belady' is none of expected, fld_lru"),
    (lambda: two(["lru"]), "is none of"),
    (lambda: make_policy("lru", layers=0, experts=2), "layers=0, experts=2"),
    (lambda: two("lru", encoder=[0]), "no option 'encoder': it has no options"),
    (lambda: two("expected", frequencies={}), "it has encoder"),
    (lambda: two("expected", encoder=[2]), "encoder names layer 2: layers are 0"),
    (lambda: two("static"), "needs frequencies"),
    (lambda: two("static", frequencies={(0, 2): 1}), "frequencies name (0, 2)"),
    (lambda: two("static", frequencies={3: 1}), "frequencies name 3"),
    (lambda: two("static", frequencies={(0, 1): -1}), "negative or not finite"),
    (lambda: two("static", frequencies={(0, 1): "a"}), "not numbers"),
    (lambda: two("static", frequencies=[[1, 2, 3]]), "the shape (1, 3)"),
    (lambda: two("paper_intent", freq_source="of"), "offline, online or mixed"),
    (lambda: two("paper_intent", freq_source="offline"), "needs frequencies"),
])
def test_wrong_choices_are_told_in_a_line(made, told):
    with pytest.raises(ConfigError) as caught:
        made()
    assert told in str(caught.value)


def test_the_default_and_the_names():
    assert DEFAULT_POLICY == "expected" == make_policy(layers=1, experts=1).name
    assert list(POLICIES) == [p.name for p in POLICIES.values()]
    assert set(LAYERED) == {"expected", "fld_lru", "layer_lru", "layer_lfu", *PAPER}


def test_the_cache_needs_no_torch():
    code = (
        "import sys; import poise_edgemoe.cache as c; assert 'numpy' not in sys.modules; "
        "c.simulate([(0, 0), (1, 0)], 1); c.read_trace; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
