"""Uses that the default policy notes and puts down later are those of a plain loop, whatever else comes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise_edgemoe import fused
from poise_edgemoe.cache.policies import Expected
from poise_edgemoe.cache.policy import leaves

LAYERS, EXPERTS = 4, 5
layer, expert = st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)
calls = st.one_of(
    st.tuples(st.just("used_together"), layer, st.lists(expert, max_size=4)),
    st.tuples(st.sampled_from(["used", "added", "removed", "victim"]), st.tuples(layer, expert)),
    st.tuples(st.sampled_from(["next_token", "scores"])))


class OneByOne(Expected):
    def used_together(self, layer, experts):
        for e in experts:
            self.used((layer, e))


def said(policy, name, *given):
    found = getattr(policy, name)(*given)
    return found.tolist() if name == "scores" else found


@pytest.mark.parametrize("encoder", [(), (0,), (0, 1), (3,)])
@settings(max_examples=300, deadline=None)
@given(st.lists(calls, max_size=25))
def test_uses_together_are_uses_one_by_one(encoder, made):
    noted, plain = (kind(LAYERS, EXPERTS, encoder) for kind in (Expected, OneByOne))
    for call in [*made, ("scores",), ("victim", (0, 0))]:
        assert said(noted, *call) == said(plain, *call)
    assert noted._last.tolist() == plain._last.tolist()


def test_a_list_of_uses_may_be_written_to_again():
    policy, plain, experts = Expected(2, 4), OneByOne(2, 4), [0, 1]
    for one in (policy, plain):
        one.used_together(0, list(experts) if one is plain else experts)
    experts[:] = [2, 3]
    assert policy.scores().tolist() == plain.scores().tolist()


few = st.sampled_from([0.0, 1.0, 2.5, 1e6, -3.0, np.inf, -np.inf])
number = st.integers(0, LAYERS * EXPERTS - 1)


@settings(max_examples=300, deadline=None)
@given(st.lists(few, min_size=20, max_size=20), st.lists(st.booleans(), min_size=20, max_size=20),
       st.lists(st.integers(0, 3), min_size=20, max_size=20), st.lists(number, max_size=8),
       st.sampled_from([None, *range(LAYERS)]))
def test_c_finds_who_leaves_as_numpy_does(scores, resident, last, pinned, of):
    if (it := fused.library()) is None:
        pytest.skip("no compiler")
    among = range(LAYERS * EXPERTS) if of is None else range(of * EXPERTS, (of + 1) * EXPERTS)
    given_ = [np.array(a, dtype=kind).reshape(LAYERS, EXPERTS)
              for a, kind in ((scores, float), (resident, bool), (last, np.int64))]
    for kind in (np.float64, np.float32):
        given_[0] = given_[0].astype(kind)
        assert it.victim(*given_, among, pinned) == leaves(*given_, among, pinned)
