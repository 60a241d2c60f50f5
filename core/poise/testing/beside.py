"""What every adapter keeps beside others on the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poise.errors import PoiseError
from poise.testing.cases import Case, is_plain, same
from poise.testing.faults import expect, expect_refusal


def _switching(case: Case) -> None:
    base = case.call(case.make())
    trained = case.trained()
    acting = case.call(trained.model)
    with trained.disable():
        expect(trained.active is False, "active is not False within disable()")
        expect(torch.equal(case.call(trained.model), base), "it acts within disable()")
    expect(torch.equal(case.call(trained.model), acting), "it does not act again after disable()")
    try:
        with trained.disable():
            raise KeyError
    except KeyError:
        pass
    expect(trained.active is True, "it stays switched off after an exception within disable()")
    trained.active = False
    expect(torch.equal(case.call(trained.model), base), "it acts with active = False")
    with trained.disable():
        pass
    expect(trained.active is False, "disable() switches on what was off before")
    trained.active = True
    expect(torch.equal(case.call(trained.model), acting), "it does not act again with active = True")


def _several(case: Case) -> None:
    first = case.trained()
    alone = case.call(first.model)
    expect_refusal(lambda: case.attach(first.model), "a second adapter of the same name is accepted")
    second = case.trained(first.model, name="second")
    both = case.call(first.model)
    expect(not torch.equal(both, alone), "a second adapter does not act beside the first")
    expect(not {id(p) for g in second.trainable() for p in g["params"]}
           & {id(p) for g in first.trainable() for p in g["params"]},
           "trainable() of one adapter holds parameters of another")
    with second.disable():
        expect(torch.equal(case.call(first.model), alone),
               "switching one adapter off changes what another does")
    _fold_in_order(case, first, second, both)
    second.detach()
    expect(torch.equal(case.call(first.model), alone), "detaching one adapter changes what another does")
    first.detach()
    expect(torch.equal(case.call(first.model), case.call(case.make())),
           "detaching every adapter does not restore the frozen base")
    is_plain(first.model, case.make(), "detaching every adapter")


def _fold_in_order(case: Case, first: Any, second: Any, both: Tensor) -> None:
    """Each fold leaves the output, or is refused; afterwards all is as before."""
    folded = []
    for attached in (second, first, second):
        try:
            attached.fold()
            folded.append(attached)
        except PoiseError:
            expect(attached is second, "the adapter that was attached first cannot be folded first")
        same(case.call(first.model), both, "folding one adapter while another acts changes the output")
    for attached in reversed(folded):
        attached.unfold()
    expect(torch.equal(case.call(first.model), both),
           "unfolding several adapters does not restore the output")


def _alone(case: Case) -> None:
    attached = case.attach()
    attached.active = True

    def off() -> None:
        attached.active = False

    expect_refusal(off, "active = False is accepted, though there are no other weights")
    expect_refusal(lambda: attached.disable().__enter__(),
                   "disable() is accepted, though there are no other weights")
    expect_refusal(lambda: case.attach(attached.model, name="second"),
                   "a second adapter on weights that this one holds alone is accepted")


FREEZING: dict[str, Callable[[Case], Any]] = {
    "switching off and on": _switching, "several adapters": _several}
HOLDING: dict[str, Callable[[Case], Any]] = {"holds its weights alone": _alone}
