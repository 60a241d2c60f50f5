"""Half precision: every prompt is exact, and oneDNN's kernels are kept few where that can still be said."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from cases import some
from loads import asked_again
from moe_models import ids, reference, saved

from poise.quantizers import kernel
from poise_edgemoe import fused
from poise_edgemoe.engine import Engine
from poise_edgemoe.kernels import bound_kernels
from poise_edgemoe.loading import prepare
from poise_edgemoe.store.writer import convert

COUNT = """
import ctypes, json, os, sys, torch, torch.nn.functional as F
from poise_edgemoe.kernels import bound_kernels
from poise_edgemoe.loading import prepare
torch.set_num_threads(1)
w = torch.randn(2048, 1024).bfloat16()
if sys.argv[1] == "late":
    F.linear(torch.ones(64, 1024).bfloat16(), w)
bounded = bound_kernels(torch.bfloat16)
F.linear(torch.ones(4, 1024).bfloat16(), w)

def held():
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = held()
for n in range(1, 129):
    F.linear(torch.ones(n, 1024).bfloat16(), w)
left = [n for n in os.environ if n in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")]
print(json.dumps([bounded, held() - before, left]))
"""


def counted(when):
    done = subprocess.run([sys.executable, "-c", COUNT, when], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN makes no bf16 here")
def test_kernels_are_few_when_it_is_said_in_time():
    bounded, grown, left = counted("early")
    assert bounded and grown < 16 << 20 and not left
    late, more, _ = counted("late")
    assert not late and more > 2 * grown


def test_single_precision_has_no_such_kernels():
    assert bound_kernels(torch.float32)


@pytest.mark.parametrize("seeds", some([8, 80], keep=[8]))
def test_prompts_of_every_length_are_exact_in_bf16(seeds, tmp_path):
    wide = {"hidden_size": 192, "intermediate_size": 320, "num_local_experts": 8, "head_dim": 96,
            "max_position_embeddings": 256}
    source = saved(tmp_path / "model", "mixtral", torch.bfloat16, **wide)
    store = convert(source, tmp_path / "store", bits=16)
    plain = reference(source, torch.bfloat16, context=256)
    with Engine.open(store, context=256, batch=3) as engine:
        for seed in range(seeds):
            prompt = ids(1 + seed % 3, 17 + (37 * seed) % 200, seed)
            assert torch.equal(engine.logits(prompt), plain.logits(prompt))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN makes no bf16 here")
def test_a_limit_that_may_not_be_kept_is_said(tmp_path):
    code = """
import sys, warnings, torch, torch.nn.functional as F
from poise_edgemoe import Engine
F.linear(torch.ones(64, 1024).bfloat16(), torch.ones(64, 1024).bfloat16())
warnings.simplefilter("error")
Engine.open(sys.argv[1], context=32).close()
try:
    Engine.open(sys.argv[1], memory="100MB", context=32)
except UserWarning as said:
    print(said)
"""
    store = convert(saved(tmp_path / "model", "olmoe", torch.bfloat16), tmp_path / "store", bits=16)
    given = [sys.executable, "-c", code, str(store)]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    assert "oneDNN keeps kernels without bounds" in done.stdout


@pytest.mark.parametrize(("bits", "hot", "built"), [(4, "bf16", True), (16, "bf16", False), (16, 8, True)])
def test_what_dequantizes_is_built_before_the_limit_begins(bits, hot, built, tmp_path, monkeypatch):
    source = saved(tmp_path / "model", "olmoe")
    store = convert(source, tmp_path / "store", bits=bits, hot=hot, group=8)
    for module in (kernel, fused):
        monkeypatch.setattr(module, "_LOADED", asked_again(module._LOADED))
    prepare(store)
    assert all((module._LOADED.made() is not None) == built for module in (kernel, fused))
