"""What tuning over a store holds: hot weights, one layer's experts, the adapter; measured, and counted."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from test_tuning import TEXT, train

from poise.testing.families import tiny
from poise_bone import Bone
from poise_edgemoe import convert
from poise_edgemoe.synthetic import write_olmoe
from poise_edgemoe.tuning import shelf as shelves
from poise_edgemoe.tuning.model import open_streamed, shelf_of

WORKER = str(Path(__file__).parents[2] / "benchmarks/edgemoe_tuning/worker.py")
MEBI = 1 << 20
BESIDE = 48 * MEBI  # a layer's activations for 128 tokens (8), logits, a matrix being made, allocators


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_no_more_than_one_layers_matrices_are_in_memory(tmp_path, monkeypatch, recompute, variant):
    """Each is counted from when its memory is mapped to when nobody holds it any more."""
    alive, most = {}, [0]

    class Counted(mmap.mmap):
        pass

    def counted(size):
        place = Counted(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        alive[id(place)] = size
        weakref.finalize(place, alive.pop, id(place))
        most[0] = max(most[0], sum(alive.values()))
        return place

    monkeypatch.setattr(shelves, "mapped", counted)
    convert(tiny("olmoe", num_hidden_layers=4), tmp_path / "store", bits=32)
    model = open_streamed(tmp_path / "store", recompute=recompute)
    train(model, Bone(r=4, variant=variant), steps=3)
    model.eval()(TEXT)
    # one more is in the hands of the thread that reads
    assert most[0] <= shelf_of(model).layer_bytes + 4096
    assert most[0] >= shelf_of(model).layer_bytes // 2


def measured(**given):
    """Return what a process says that trains a model of its own."""
    given = {"length": 128, "r": 8, "variant": "bone", "steps": 4, **given}
    done = subprocess.run([sys.executable, WORKER, json.dumps(given, default=str)], check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_process_that_tunes_holds_hot_weights_one_layer_and_the_adapter(tmp_path):
    """302 MB of experts in six layers; losses are those of the model in memory, bit for bit."""
    path = write_olmoe(tmp_path / "model", layers=6, hidden=256, inner=512, experts=32, top=4, vocab=512)
    store = convert(path, tmp_path / "store", bits=32)
    found = measured(store=store)
    experts = 6 * found["layer"]
    assert experts > 300e6
    assert found["grown"] <= found["hot"] + found["layer"] + found["adapter"] + BESIDE
    assert found["grown"] <= experts / 2
    hot = measured(store=store, exclude=["experts.*"])
    assert hot["grown"] <= hot["hot"] + hot["layer"] + hot["adapter"] + BESIDE
    plain = measured(path=path)
    assert plain["losses"] == found["losses"]
    assert plain["grown"] >= experts
