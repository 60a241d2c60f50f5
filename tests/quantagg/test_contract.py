"""Every entry of the plugin, built from its example, through the core's contract kits."""

import pytest

from poise.registry import entries
from poise.testing import check_aggregator, check_model
from poise_quantagg.stacker import QuantileStacker

OWN = [e for e in entries() if e.plugin == "quantagg"]


def own(kind):
    return [pytest.param(e, id=e.name) for e in OWN if e.kind == kind]


def test_what_the_plugin_brings():
    assert {e.kind for e in OWN} == {"model", "aggregator", "recipe"}
    assert all(e.tasks == ("quantile",) and e.summary for e in OWN)
    for entry in OWN:
        entry.load()(**entry.example)


def test_the_stacker_takes_the_aggregators_of_the_registry():
    for entry in OWN:
        if entry.kind == "aggregator":
            assert type(QuantileStacker(entry.name).component()) is entry.load()


@pytest.mark.slow  # the core's tests do the same by default
@pytest.mark.parametrize("entry", own("model"))
def test_models_keep_the_contract(entry):
    check_model(entry.load()(**entry.example), "quantile")


@pytest.mark.slow
@pytest.mark.parametrize("entry", own("aggregator"))
def test_aggregators_keep_the_contract(entry):
    check_aggregator(entry.load()(**entry.example))
