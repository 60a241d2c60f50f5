"""What the process holds beside its base stays within the limit: through a prompt, another, and a batch."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from cases import slowly

from poise.errors import ConfigError
from poise.testing.families import tiny
from poise_edgemoe.budget import plan_memory
from poise_edgemoe.store.writer import convert
from poise_edgemoe.synthetic import write_olmoe

transformers = pytest.importorskip("transformers")

WORKER = """
import json, sys, torch
torch.set_num_threads(1)
import transformers.models.olmoe.modeling_olmoe
from poise_edgemoe import Engine
store, memory, context, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
prefetch = sys.argv[5] if len(sys.argv) > 5 else "none"
share = float(sys.argv[6]) if len(sys.argv) > 6 else 0.0

def status(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024

with Engine.open(store, memory=memory, context=context, batch=batch, prefetch=prefetch,
                 base_share=share) as engine:
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is that of imports
    for seed in range(2):
        ids = torch.randint(3, 8000, (batch, context - 4), generator=torch.Generator().manual_seed(seed))
        engine.generate(ids, 4)
    if prefetch != "none" or share:
        engine.generate(ids[:, :32], 24)
    faults = status("VmHWM") - engine.base
    print(json.dumps({"grown": faults, "total": engine.budget.total, "hits": engine.stats()["hit_rate"],
                      "chunk": engine.budget.chunk, "planes": engine.stats()["planes"],
                      "ahead": engine.stats()["prefetch"]["prefetched"]}))
"""


CONVERTER = """
import json, sys, torch
torch.set_num_threads(1)
import transformers.models.olmoe.modeling_olmoe
from poise_edgemoe import convert

def status(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024

convert(sys.argv[1], sys.argv[2] + "/first")  # libraries set themselves up
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
convert(sys.argv[1], sys.argv[2] + "/second", bits=8)
print(json.dumps({"grown": status("VmHWM") - before}))
"""


@pytest.mark.slow
def test_conversion_holds_hot_weights_and_two_layers_at_most(tmp_path):
    model = olmoe()
    model.save_pretrained(tmp_path / "model")
    layer = sum(p.nbytes for n, p in model.named_parameters() if "layers.0.mlp.experts" in n)
    hot = sum(p.nbytes for n, p in model.named_parameters() if ".experts." not in n)
    del model
    done = subprocess.run([sys.executable, "-c", CONVERTER, str(tmp_path / "model"), str(tmp_path)],
                          capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["grown"] <= hot + 2 * layer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return convert(olmoe(), tmp_path_factory.mktemp("memory") / "store", bits=16)


def olmoe():
    """Return a random model of 4 layers of 32 experts, 220 MB in fp32."""
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_experts=32, num_experts_per_tok=4,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=8000, max_position_embeddings=4096,
        eos_token_id=None, pad_token_id=0)
    return transformers.OlmoeForCausalLM(config)


@pytest.mark.parametrize(("memory", "context", "batch", "prefetch"), [
    ("60MB", 96, 1, "lookahead"), *map(slowly, [
        ("60MB", 512, 1, "lookahead"), ("60MB", 512, 1, "none"), ("80MB", 512, 3, "lookahead"),
        ("105MB", 4096, 1, "none")])])
def test_the_limit_is_kept(memory, context, batch, prefetch, store):
    whole = sum(p.stat().st_size for p in store.iterdir())
    given = [sys.executable, "-c", WORKER, str(store), memory, str(context), str(batch), prefetch]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["total"] <= int(memory[:-2]) * 10**6 < whole and (said["ahead"] > 0) == (prefetch != "none")
    assert said["grown"] <= said["total"] and 0 < said["hits"] < 1, said


@pytest.mark.parametrize("share", [0.5, slowly(0.0), slowly(1.0)])
def test_the_limit_is_kept_while_planes_are_put_together(share, tmp_path):
    store = convert(olmoe(), tmp_path / "store", bits=8, planes=2)
    with pytest.raises(ConfigError, match="smallest workable value") as told:
        plan_memory(store, memory="1kB", context=96, base_share=share)
    memory = int(re.search(r"value is (\d+)MB", str(told.value))[1]) + 6
    given = [sys.executable, "-c", WORKER, str(store), f"{memory}MB", "96", "1", "none", str(share)]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["grown"] <= said["total"] <= memory * 10**6 and 0 < said["hits"] < 1, said
    assert (said["planes"]["from_base"] > 0) == (share > 0)


@pytest.mark.slow
def test_the_smallest_limit_is_kept_beside_a_packed_head(tmp_path):
    """Its product is made in slices, for one row of a prompt or token: those must not pile up."""
    sizes = {"layers": 1, "hidden": 2048, "inner": 64, "experts": 8, "top": 2, "vocab": 50304}
    store = convert(write_olmoe(tmp_path / "model", **sizes), tmp_path / "store", hot=8)
    with pytest.raises(ConfigError, match="smallest workable value") as told:
        plan_memory(store, memory="1kB", context=64)
    memory = re.search(r"value is (\d+MB)", str(told.value))[1]
    done = subprocess.run([sys.executable, "-c", WORKER, str(store), memory, "64", "1"],
                          capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["grown"] <= int(memory[:-2]) * 10**6, said


WIDE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32,
        "vocab_size": 8000, "max_position_embeddings": 4096, "eos_token_id": None}
SIXTEEN = {"num_local_experts": 16}
LATENT = {"moe_intermediate_size": 512, "n_routed_experts": 16, "kv_lora_rank": 64, "q_lora_rank": 64,
          "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "head_dim": 16,
          "num_key_value_heads": 8}


@pytest.mark.slow
@pytest.mark.parametrize(("context", "batch"), [(1024, 1), (256, 3)])
@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.bfloat16, 4)])
@pytest.mark.parametrize(
    ("family", "own"), [("gpt_oss", SIXTEEN), ("granitemoe", SIXTEEN), ("deepseek_v3", LATENT)])
def test_the_smallest_limit_is_kept(family, own, dtype, bits, context, batch, tmp_path):
    """Scores in full, heads that share keys, latent keys: each is counted in another way."""
    model = tiny(family, **{**WIDE, "intermediate_size": 512, **own}).to(dtype)
    store = convert(model, tmp_path / "store", bits=bits)
    with pytest.raises(ConfigError, match="smallest workable value") as told:
        plan_memory(store, memory="1kB", context=context, batch=batch)
    memory = re.search(r"value is (\d+MB)", str(told.value))[1]
    given = [sys.executable, "-c", WORKER, str(store), memory, str(context), str(batch)]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["grown"] <= int(memory[:-2]) * 10**6, said


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 4])
def test_the_smallest_limit_is_kept_by_an_encoder(heads, tmp_path):
    """Relative positions are a table of all tokens by all tokens, however many heads there are."""
    model = tiny("switch_transformers", d_model=64, d_kv=16, d_ff=128, num_heads=heads, num_experts=8)
    store = convert(model, tmp_path / "store", bits=32)
    with pytest.raises(ConfigError, match="smallest workable value") as told:
        plan_memory(store, memory="1kB", context=1500)
    memory = re.search(r"value is (\d+MB)", str(told.value))[1]
    worker = WORKER.replace("8000", "250")
    done = subprocess.run([sys.executable, "-c", worker, str(store), memory, "1500", "1"],
                          capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["grown"] <= int(memory[:-2]) * 10**6, said
