"""A dense model cut into experts says what it said, in memory and from a store under a limit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from moe_models import ids

from poise.errors import ConfigError
from poise_edgemoe import Engine, convert, split_feed_forward
from poise_edgemoe.store.index import read_index

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "bos_token_id": 0, "eos_token_id": 1}
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def dense(family="Llama", **options):
    """Return a random model with weights so large that rounding would be seen."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.dim() > 1 else p.uniform_(0.5, 2)
    return model


def difference(got, want):
    """Return the largest difference, relative to the largest logit."""
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("family", "options", "experts"), [
    ("Llama", {}, 8), ("Llama", {"tie_word_embeddings": True}, 2), ("Llama", {"intermediate_size": 60}, 3),
    ("Llama", {"rope_parameters": SCALED}, 4),
    ("Llama", {"hidden_act": "gelu", "head_dim": 16}, 8),
    ("Mistral", {"sliding_window": 5}, 4),
])
def test_logits_are_those_of_the_dense_model(family, options, experts, tmp_path):
    model = dense(family, **options)
    want = model(ids(2, 40)).logits
    split = split_feed_forward(model, experts)
    assert type(split) is transformers.MixtralForCausalLM
    assert difference(split(ids(2, 40)).logits, want) <= 1e-5
    assert all(p.is_contiguous() for p in split.parameters())
    store = convert(split, tmp_path / "store", bits=32)
    index = read_index(store)
    assert {len(layer.experts) for layer in index.layers} == {experts}
    with Engine.open(store, batch=2, context=64) as engine:
        assert torch.equal(engine.logits(ids(2, 40)), split(ids(2, 40)).logits)


def test_feed_forward_layers_are_let_go_one_by_one_and_the_rest_is_not_copied():
    model = dense()
    gone = [weakref.ref(block.mlp.up_proj.weight) for block in model.model.layers]
    kept = model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    split = split_feed_forward(model)
    assert not any(one() is not None for one in gone)
    assert split.model.layers[0].self_attn.q_proj.weight.data_ptr() == kept


@pytest.mark.parametrize(("make", "words"), [
    (lambda: (dense(), 5), "experts=5 do not divide the inner width 64"),
    (lambda: (dense(), 1), "experts=1 is not allowed: it must be a whole number >= 2"),
    (lambda: (dense(), True), "experts=True is not allowed"),
    (lambda: (dense("Mixtral"), 8), "MixtralForCausalLM is of the family 'mixtral': only dense"),
    (lambda: (dense("Qwen2"), 8), "of the family 'qwen2': only dense language models of llama, mistral"),
    (lambda: (dense().model, 8), "LlamaModel is of the family 'llama': only dense language models"),
    (lambda: (torch.nn.Linear(2, 2), 8), "Linear is of the family 'Linear'"),
    (lambda: (dense(attention_bias=True), 8), r"not a plain Llama: model.layers.0.self_attn.k_proj.bias"),
    (lambda: (dense(mlp_bias=True), 8), "a feed-forward layer holds gate_proj.weight, gate_proj.bias"),
])
def test_what_cannot_be_split_is_refused_and_left_whole(make, words):
    model, experts = make()
    before = set(model.state_dict())
    with pytest.raises(ConfigError, match=words) as e:
        split_feed_forward(model, experts)
    assert "\n" not in str(e.value) and set(model.state_dict()) == before


def test_a_model_is_split_once():
    model = dense()
    split_feed_forward(model)
    with pytest.raises(ConfigError, match=r"layer holds nothing: .*was this model split before"):
        split_feed_forward(model)


# ------------------------------------------------------------------ the packaged model, in its own process

SMOLLM2 = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import transformers.models.mixtral.modeling_mixtral
from poise.models.smollm2 import load, tokenizer
from poise_edgemoe import Engine, convert, split_feed_forward

def status(key):
    return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024

def difference(got, want):
    return float((got - want).abs().max() / want.abs().max())

text = "In the year 1790 the President said that the people of the United States"
model, words = load(), tokenizer()
given = torch.tensor([words.encode(text)])
with torch.no_grad():
    want = model(given).logits
    greedy = model.generate(given, max_new_tokens=int(sys.argv[2]), do_sample=False)
    block = sum(p.nbytes for p in model.model.layers[0].mlp.parameters())
    bytes_ = sum(p.nbytes for p in model.parameters())
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    split = split_feed_forward(model)
    said = {"grown": status("VmHWM") - before, "block": block, "bytes": bytes_}
    del model
    said["in memory"] = difference(split(given).logits, want)
convert(split, sys.argv[1], bits=32)
del split
with Engine.open(sys.argv[1], memory="400MB", context=128) as engine:
    said["stored"] = difference(engine.logits(given), want)
    said["same text"] = bool(torch.equal(engine.generate(given, int(sys.argv[2])), greedy))
    stats = engine.stats()
    said |= {"hits": stats["hit_rate"], "total": engine.budget.total}
print(json.dumps(said))
"""


@pytest.mark.slow
def test_smollm2_from_a_store_under_a_limit_says_what_the_dense_model_says(tmp_path):
    pytest.importorskip("gguf")
    from poise.data.packaged import find

    find("smollm2")
    done = subprocess.run([sys.executable, "-c", SMOLLM2, str(tmp_path / "store"), "64"],
                          capture_output=True, text=True, check=False)
    shutil.rmtree(tmp_path / "store", ignore_errors=True)  # half a gigabyte
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["in memory"] <= 1e-5 and said["stored"] <= 1e-5 and said["same text"], said
    assert said["total"] <= 400e6 < 0.8 * said["bytes"] and 0 <= said["hits"] < 1, said
    assert said["grown"] <= 5 * said["block"], said  # of 30; holes of the allocator included
