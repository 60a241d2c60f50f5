"""A model with random weights is written piece by piece, the same each time, and read by all others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_models import ids

from poise.errors import ConfigError, FileError
from poise_edgemoe import Engine, convert, synthetic
from poise_edgemoe.synthetic import write_olmoe

transformers = pytest.importorskip("transformers")
SIZES = {"layers": 2, "hidden": 32, "inner": 24, "experts": 6, "top": 3, "vocab": 300, "context": 64}
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "edgemoe_decode" / "make_model.py"


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_transformers_reads_it_and_the_engine_serves_it(tmp_path):
    model = transformers.OlmoeForCausalLM.from_pretrained(write_olmoe(tmp_path / "model", **SIZES)).eval()
    model.set_experts_implementation("eager")
    assert model.dtype == torch.bfloat16 and all(p.isfinite().all() for p in model.parameters())
    embedded = model.model.embed_tokens.weight
    drawn = torch.cat([p.detach().flatten().float() for p in model.parameters()
                       if p.dim() > 1 and p is not embedded])
    assert abs(float(drawn.std()) / synthetic.SPREAD - 1) < 0.02 and abs(float(drawn.mean())) < 1e-3
    assert abs(float(embedded.float().std()) / synthetic.EMBEDDED - 1) < 0.02
    experts = model.model.layers[1].mlp.experts.gate_up_proj
    assert experts.shape == (6, 48, 32) and not torch.equal(experts[0], experts[1])
    store = convert(tmp_path / "model", tmp_path / "store", bits=16)
    with Engine.open(store) as engine, torch.no_grad():
        assert torch.equal(engine.logits(ids()), model(ids()).logits)


@torch.no_grad()
def test_tokens_are_routed_at_random_in_every_layer(tmp_path):
    """All experts are used about alike, and a token shares with the one before what chance gives."""
    sizes = {**SIZES, "layers": 4, "hidden": 512, "inner": 64, "experts": 16, "top": 4, "vocab": 2048,
             "context": 512}
    model = transformers.OlmoeForCausalLM.from_pretrained(write_olmoe(tmp_path / "model", **sizes)).eval()
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, given, made: chosen.append(made[2]))
    model(torch.randint(3, 2048, (1, 400), generator=torch.Generator().manual_seed(0)))
    for index in chosen:
        uses = torch.bincount(index.flatten(), minlength=16) / index.numel()
        again = (index[1:, :, None] == index[:-1, None, :]).any(-1).float().mean()
        assert uses.max() < 3 / 16 and uses.min() > 1 / 64 and abs(float(again) - 4 / 16) < 0.1


def test_bytes_are_those_of_the_seed_however_they_are_cut(tmp_path, monkeypatch):
    first = files(write_olmoe(tmp_path / "a", **SIZES, seed=3))
    assert files(write_olmoe(tmp_path / "b", **SIZES, seed=3)) == first
    assert files(write_olmoe(tmp_path / "c", **SIZES))["model.safetensors"] != first["model.safetensors"]
    whole = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "a").state_dict()
    monkeypatch.setattr(synthetic, "SHARD", 20_000)
    write_olmoe(tmp_path / "d", **SIZES, seed=3)
    assert len(list((tmp_path / "d").glob("*.safetensors"))) > 3
    cut = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "d").state_dict()
    assert all(torch.equal(cut[k], v) for k, v in whole.items())


def test_it_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    """Of the tensors that were drawn, those of two files at most are alive at a time."""
    import weakref

    real, alive, most = synthetic._tensors, [], [0]

    def watched(*given):
        for name, tensor in real(*given):
            alive.append((weakref.ref(tensor), tensor.nbytes))
            most[0] = max(most[0], sum(n for r, n in alive if r() is not None))
            yield name, tensor

    monkeypatch.setattr(synthetic, "_tensors", watched)
    monkeypatch.setattr(synthetic, "SHARD", 20_000)
    folder = write_olmoe(tmp_path / "model", **SIZES)
    whole = sum(p.stat().st_size for p in folder.iterdir())
    assert most[0] <= 2 * 20_000 + 300 * 32 * 2 < whole / 2


@pytest.mark.parametrize(("options", "words"), [
    ({"layers": 0}, "layers=0 is not allowed: it must be a whole number >= 1"),
    ({"hidden": True}, "hidden=True is not allowed"),
    ({"top": 7}, "top=7 is not allowed: there are 6 experts"),
    ({"seed": -1}, "seed=-1 is not allowed: it must be a whole number from 0"),
])
def test_an_option_that_is_not_allowed_is_named(options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        write_olmoe(tmp_path / "model", **{**SIZES, **options})
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_and_nothing_half_written_stays(tmp_path, monkeypatch):
    write_olmoe(tmp_path / "model", **SIZES)
    before = files(tmp_path / "model")
    with pytest.raises(ConfigError, match="model exists: remove it first"):
        write_olmoe(tmp_path / "model", **SIZES, seed=1)
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(ConfigError, match=r"other\.partial exists: remove it first"):
        write_olmoe(tmp_path / "other", **SIZES)
    (tmp_path / "other.partial").rmdir()

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "write_json", full)
    with pytest.raises(FileError, match="No space left on device"):
        write_olmoe(tmp_path / "other", **SIZES)
    assert files(tmp_path / "model") == before and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_script_takes_every_size(tmp_path):
    given = [part for name, size in SIZES.items() for part in (f"--{name}", str(size))]
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "a"), *given], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0 and "in 1 files" in done.stdout, done.stderr
    assert files(tmp_path / "a") == files(write_olmoe(tmp_path / "b", **SIZES))
    again = subprocess.run(done.args, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and again.stderr.startswith("make_model: ")
    assert again.stderr.count("\n") == 1
