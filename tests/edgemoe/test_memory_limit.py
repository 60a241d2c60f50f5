"""What the process holds beside its base stays within the limit: through a prompt, another, and a batch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from poise_edgemoe.store.writer import convert

transformers = pytest.importorskip("transformers")

WORKER = """
import json, sys, torch
torch.set_num_threads(1)
import transformers.models.olmoe.modeling_olmoe
from poise_edgemoe import Engine
store, memory, context, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def status(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024

with Engine.open(store, memory=memory, context=context, batch=batch) as engine:
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is that of imports
    for seed in range(2):
        ids = torch.randint(3, 8000, (batch, context - 4), generator=torch.Generator().manual_seed(seed))
        engine.generate(ids, 4)
    faults = status("VmHWM") - engine.base
    print(json.dumps({"grown": faults, "total": engine.budget.total, "hits": engine.stats()["hit_rate"],
                      "chunk": engine.budget.chunk}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_experts=32, num_experts_per_tok=4,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=8000, max_position_embeddings=4096,
        eos_token_id=None, pad_token_id=0)
    model = transformers.OlmoeForCausalLM(config)
    return convert(model, tmp_path_factory.mktemp("memory") / "store", bits=16)


@pytest.mark.parametrize(("memory", "context", "batch"), [
    ("60MB", 512, 1), pytest.param("80MB", 512, 3, marks=pytest.mark.slow),
    pytest.param("105MB", 4096, 1, marks=pytest.mark.slow)])
def test_the_limit_is_kept(memory, context, batch, store):
    whole = sum(p.stat().st_size for p in store.iterdir())
    given = [sys.executable, "-c", WORKER, str(store), memory, str(context), str(batch)]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["total"] <= int(memory[:-2]) * 10**6 < whole
    assert said["grown"] <= said["total"] and 0 < said["hits"] < 1, said
