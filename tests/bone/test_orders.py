"""Two adapters in any order of calls: the model computes with both changes, and the base comes back.

What is refused is worked out beside it, so that nothing is refused that need not be, and nothing let pass.
"""

from __future__ import annotations

import copy
import tempfile
import warnings

import pytest
import torch
import torch.nn.functional as F
from bone_forms import VARIANTS, randn
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from poise import load_adapter, save_adapter
from poise.errors import ConfigError
from poise.quantizers import Affine, quantize_model
from poise.walk import weights
from poise_bone import Bone
from poise_bone.functional import changed

X = randn(6, 8, seed=9)
TARGETS = {"all": None, "first": ["0"], "last": ["2"], "experts": ["experts.*"]}
PLACES = st.integers(0, 1)
FORMS = st.builds(
    lambda variant, r, where: Bone(
        r=r, variant=variant, target_modules=TARGETS[where],
        **{"mini": {"mini_r": 2}, "bone_free": {"tiles": [2, 1]}}.get(variant, {})),
    st.sampled_from(VARIANTS), st.sampled_from([2, 4]), st.sampled_from(sorted(TARGETS)))


class Fused(nn.Module):
    """Two experts in one parameter, as transformers keeps them."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(2, 8, 8))

    def forward(self, x):
        return F.linear(x, self.up_proj[0]) + F.linear(x, self.up_proj[1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Fused()

    def forward(self, x):
        return self.experts(x)


def network(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), Block()).double()
    model[3].experts.up_proj.data.copy_(0.3 * randn(2, 8, 8, seed=4))
    if kind == "packed":
        quantize_model(model, Affine(8, 8), {"0": 8, "experts.*": 8})
    return model


class Expected:
    """What is known of one adapter: its blocks, those in the weights, and what it does."""

    def __init__(self, attached, variant):
        self.attached, self.variant = attached, variant
        self.layers = set(attached.layers)
        self.active = self.folded = False
        self.held = {}

    def blocks(self):
        return {n: layer.block().detach().clone() for n, layer in self.attached.layers.items()}

    @property
    def acts(self):
        return self.active and not self.folded

    @property
    def retrained(self):
        now = self.blocks()
        return self.folded and any(not torch.equal(now[n], self.held[n]) for n in now)


class Orders(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        warnings.simplefilter("ignore")
        self.there = []  # in the order in which they were attached
        self.seed = 0

    @initialize(kind=st.sampled_from(["plain", "packed"]), first=FORMS, second=FORMS)
    def start(self, kind, first, second):
        self.model, self.reference = network(kind), network("plain")
        self.places = list(weights(self.reference))
        self.base = {w.name: w.read().clone() for w in weights(self.model)}
        self.merged = False
        self.attach(first)
        self.attach(second)

    # -------------------------------------------------------- what is expected

    def found(self, at):
        return self.there[at]

    def meeting(self, one, later):
        """Earlier or later adapters on weights of one."""
        place = self.there.index(one)
        others = self.there[place + 1:] if later else self.there[:place]
        return [o for o in others if o.layers & one.layers]

    def may_fold(self, one):
        return one.active and not one.retrained and not any(o.acts for o in self.meeting(one, False))

    def may_unfold(self, one):
        return not one.folded or not any(o.folded for o in self.meeting(one, True))

    def attempt(self, allowed, action):
        """Do it, or see it refused."""
        if allowed:
            return action()
        with pytest.raises(ConfigError):
            action()
        return None

    def fill(self, one):
        self.seed += 1
        with torch.no_grad():
            for n, (_, D) in enumerate(one.attached.tensors()):
                D.copy_(0.2 * randn(*D.shape, seed=self.seed + n))

    def attach(self, bone):
        if self.there:
            self.attempt(False, lambda: bone.attach(self.model, self.there[0].attached.name))
        free = {"a", "b"} - {one.attached.name for one in self.there}
        one = Expected(bone.attach(self.model, min(free)), bone.variant)
        one.active = True
        self.there.append(one)
        self.fill(one)

    # -------------------------------------------------------- rules

    @rule(at=PLACES, folded=st.booleans())
    def train(self, at, folded):
        if folded:
            self.fold(at)
        self.fill(self.found(at))

    @rule(at=PLACES)
    def fold(self, at):
        one = self.found(at)
        allowed = self.may_fold(one)
        self.attempt(allowed, one.attached.fold)
        if allowed and not one.folded:
            one.folded, one.held = True, one.blocks()

    @rule(at=PLACES)
    def unfold(self, at):
        one = self.found(at)
        allowed = self.may_unfold(one)
        self.attempt(allowed, one.attached.unfold)
        one.folded = one.folded and not allowed

    @rule(at=PLACES, value=st.booleans())
    def switch(self, at, value):
        one = self.found(at)
        above = any(o.folded for o in self.meeting(one, True))
        allowed = value == one.active or not (one.folded or above)
        self.attempt(allowed, lambda: setattr(one.attached, "active", value))
        if allowed:
            one.active = value

    @rule(at=PLACES)
    def disable(self, at):
        one = self.found(at)
        if one.acts and not any(o.folded for o in self.meeting(one, True)):
            with one.attached.disable():
                one.active = False
                self.it_computes_with_the_changes_in_turn()
            one.active = True

    @rule(at=PLACES, other=FORMS)
    def detach(self, at, other):
        one = self.found(at)
        allowed = self.may_unfold(one)
        self.attempt(allowed, one.attached.detach)
        if allowed:
            self.there.remove(one)
            self.attach(other)

    @rule(at=PLACES, other=FORMS)
    def merge(self, at, other):
        one = self.found(at)
        earlier = any(o.acts or o.folded for o in self.meeting(one, False))
        allowed = one.active and not earlier and not one.retrained
        blocks = one.held if one.folded else one.blocks()
        self.attempt(allowed, one.attached.merge)
        if allowed:
            for n in one.layers:
                self.base[n] = changed(self.base[n], blocks[n], one.variant)
            self.there.remove(one)
            self.merged = True
            self.attach(other)

    @rule(at=PLACES)
    def save_and_load(self, at):
        """From a file; a copy of the model computes the same, and its state says all of it."""
        one = self.found(at)
        assert torch.equal(copy.deepcopy(self.model)(X), self.model(X))
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        if self.may_unfold(one):
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(one.attached, folder)
                one.attached.detach()
                self.there.remove(one)
                again = Expected(load_adapter(self.model, folder), one.variant)
                again.active = True
                self.there.append(again)

    @rule(at=PLACES)
    def load_state(self, at):
        one = self.found(at)
        tensors = {k: 0.5 * t for k, t in one.attached.state_dict().items()}
        self.attempt(not one.folded, lambda: one.attached.load_state_dict(tensors))

    # -------------------------------------------------------- what holds

    def matrices(self):
        found = dict(self.base)
        for one in self.there:
            blocks = one.held if one.folded else one.blocks()
            for n in one.layers if one.folded or one.active else ():
                found[n] = changed(found[n], blocks[n], one.variant)
        return found

    @invariant()
    def it_computes_with_the_changes_in_turn(self):
        if not hasattr(self, "model"):
            return
        now = self.matrices()
        for w in self.places:
            w.write(now[w.name])
        with torch.no_grad():
            got, want = self.model(X), self.reference(X)
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))

    @precondition(lambda self: any(one.acts for one in self.there))
    @rule()
    def gradients_reach_those_that_act(self):
        self.model.zero_grad()
        self.model(X).square().sum().backward()
        for one in self.there:
            for _, D in one.attached.tensors():
                assert (D.grad is not None and bool(D.grad.any())) == one.acts
                D.grad = None

    def teardown(self):
        for one in reversed(self.there):
            one.attached.detach()
        if hasattr(self, "model"):
            now = {w.name: w.read() for w in weights(self.model)}
            assert now.keys() == self.base.keys()
            same = torch.equal if not self.merged else torch.allclose
            assert all(same(now[n], W) for n, W in self.base.items())
            assert type(self.model[2]) is nn.Linear and all(
                p.requires_grad for p in self.model.parameters())


def run(examples, steps):
    chosen = settings(max_examples=examples, stateful_step_count=steps, deadline=None,
                      phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Orders, settings=chosen)


def test_two_adapters_in_any_order_of_calls():
    run(18, 25)


@pytest.mark.slow
def test_two_adapters_in_many_orders_of_calls():
    run(1000, 50)
