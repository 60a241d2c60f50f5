"""A limit holds through a long prompt, another topic and a batch, page cache included, on a model of 5 GB.

The large model and its store take 7 GB of disk while these tests run.
"""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from measured import FREE, GROUPED, LIMIT, WHOLE, control_group, process, run

from poise_edgemoe.store.writer import convert
from poise_edgemoe.synthetic import write_olmoe

SMALL = {"layers": 3, "hidden": 256, "inner": 512, "experts": 32, "top": 4, "vocab": 8000, "context": 4096}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A store of 90 MB."""
    folder = tmp_path_factory.mktemp("small")
    return convert(write_olmoe(folder / "model", **SMALL), folder / "store", bits=16)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store of 1.7 GB at 4 bits: 6 layers of OLMoE's shape."""
    folder = tmp_path_factory.mktemp("large")
    yield convert(write_olmoe(folder / "model"), folder / "store")
    shutil.rmtree(folder)


def check(said, memory, store):
    """Check the figures of a long prompt, another, and a batch; show them."""
    print(*said, sep="\n")
    limit = int(memory[:-2]) * 10**6
    assert limit < sum(p.stat().st_size for p in store.iterdir())
    for figures in said:
        assert figures["grown"] <= figures["total"] <= limit
    assert 0 < said[1]["hits"] < 1 and 0 < said[2]["hits"] < 1


SIZES = {"small": {"memory": "60MB", "context": 96, "second": 32, "batched": 24},
         "large": {"memory": "1200MB", "context": 256, "second": 64, "batched": 64}}
EACH = ["small", pytest.param("large", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "context"), [("1200MB", 4096), ("900MB", 1024)])
def test_a_limit_is_kept_through_a_long_prompt_another_and_a_batch(memory, context, large):
    check(run(FREE, store=large, memory=memory, context=context, second=500, batched=128), memory, large)


@pytest.mark.slow  # by default it is kept in a process without a group, in test_memory_limit.py
@pytest.mark.parametrize("size", SIZES)
def test_a_limit_is_kept_in_a_group_that_may_hold_no_more(size, request):
    """What is held before, beside page cache, and the limit: more would end the process."""
    store = request.getfixturevalue(size)
    with control_group() as group:
        done = run(GROUPED, group, store=store, **SIZES[size])
    check(done["said"], SIZES[size]["memory"], store)
    assert done["same"] and done["held"] < done["said"][0]["base"]


def test_a_process_that_takes_more_than_its_group_may_hold_is_ended():
    script = """
import json, os, sys
given = json.loads(sys.argv[1])
""" + LIMIT + """
limit(40 * 10**6)
held = [bytes([1]) * 10**6 for _ in range(given["most"])]
print("lived")
"""
    with control_group() as group:
        for most, code in ((20, 0), (80, -9)):
            given = json.dumps({"group": str(group), "most": most})
            assert process([sys.executable, "-c", script, given], group).returncode == code


@pytest.mark.parametrize("size", EACH)
def test_a_whole_process_stays_within_its_total(size, request):
    """`total` is what the system counts at its peak, libraries and all, since the process began."""
    beyond = {"small": 20, "large": 300}[size]
    said = run(WHOLE, store=request.getfixturevalue(size), context=128, beyond=beyond)
    print(said)
    assert said["peak"] <= int(said["total of all"][:-2]) * 10**6 and 0 < said["hits"] < 1
