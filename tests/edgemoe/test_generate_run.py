"""A run under a memory limit: what it writes adds up, its loss is the model's, misfits are refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from moe_models import saved
from test_moe_flags import limit

import poise
from poise.compose import compose
from poise.errors import ConfigError
from poise.interfaces import Parts
from poise.runs.building import build_parts
from poise.runs.context import RunContext
from poise_edgemoe import ByteMoE, EdgeMoEGenerate, EdgeMoEStore, convert, small_moe
from poise_edgemoe.bits import mean_loss
from poise_edgemoe.budget import parse_bytes, plan_memory, share_kept
from poise_edgemoe.cache import RoutingTrace, write_frequencies, write_trace
from poise_edgemoe.generation import in_pieces
from poise_edgemoe.store.index import read_index

TINY = {"layers": 2, "experts": 16, "hidden": 32, "inner": 32, "steps": 2, "length": 64, "batch_size": 2}
GIVEN = {"byte_moe": TINY, "bits": 32, "context": 64}
SHORT = EdgeMoEGenerate(prompts=2, prompt_length=12, max_new_tokens=10, length=40, windows=3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in the folder that is returned."""
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache in which the tiny model is trained and converted once."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """An empty folder, beside a cache that is shared."""
    monkeypatch.setenv("POISE_CACHE", str(made))
    return tmp_path


def small():
    """Return a limit for the tiny model that leaves room for 8 of 32 experts."""
    return limit(EdgeMoEStore(**GIVEN).folder(), 8)


def run(folder, recipe=SHORT, **options):
    """Return the metrics of a run of the tiny model, the rows of its table, and its summary's notes."""
    model = EdgeMoEStore(**GIVEN | options)
    context = RunContext(folder, quiet=True)
    metrics = recipe.run(Parts(data=poise.build("data", "sotu"), model=model), context)
    with open(folder / "steps.csv", newline="") as f:
        rows = [{k: v if k == "part" else float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    return metrics, rows, context.records.notes


def test_what_it_writes_adds_up(folder):
    metrics, rows, notes = run(folder / "run", memory=small())
    parts = [[r["part"] for r in rows if r["prompt"] == n] for n in (0, 1)]
    assert parts[0] == parts[1] == ["prompt"] * parts[0].count("prompt") + ["token"] * 9
    assert sum(r["tokens"] for r in rows) == 2 * (12 + 9)
    token = [r for r in rows if r["part"] == "token"]
    assert all(r["hits"] + r["misses"] == 4 for r in token)  # two layers, two experts each
    assert metrics["hit_rate"] == sum(r["hits"] for r in token) / (4 * 18)
    assert metrics["bytes_per_token"] == sum(r["bytes_read"] for r in token) / 18
    assert 0 <= metrics["machine/stall_share"] <= 1 and metrics["machine/tokens_per_second"] > 0
    assert metrics["memory_bytes"] <= parse_bytes(small()) < metrics["machine/base_bytes"]
    assert metrics["machine/peak_bytes"] >= metrics["machine/base_bytes"] - 2**22
    assert metrics["in_memory_bytes"] == sum(p.nbytes for p in ByteMoE(**TINY).build().parameters())
    assert (folder / "run/figures/token_time.png").read_bytes()[:4] == b"\x89PNG"
    assert {row["what"]: row["value"] for row in notes["what it took"]} == metrics
    text = (folder / "run/text.txt").read_text()
    assert text.count("--- prompt") == text.count("--- continuation") == 2


@pytest.mark.parametrize("limited", [True, False])
def test_with_experts_as_they_are_the_loss_is_that_of_the_model(limited, folder):
    """Windows of 40 bytes, in several pieces and in one."""
    memory = limit(EdgeMoEStore(**GIVEN).folder(), 2) if limited else None
    metrics, rows, _ = run(folder / "run", memory=memory)
    pieces = sum(r["part"] == "prompt" and r["prompt"] == 0 for r in rows)
    assert (pieces > 1) == limited
    assert metrics["loss_difference"] == 0 and metrics["loss"] == metrics["loss_in_memory"] > 1


def test_with_few_bits_the_loss_is_near_and_another(folder):
    metrics, _, _ = run(folder / "run", bits=4, memory=None)
    assert 0 < abs(metrics["loss_difference"]) < 0.05
    assert metrics["store_bytes"] < metrics["in_memory_bytes"]


def test_the_same_seed_writes_the_same_text(folder):
    texts = []
    for name, options in (("a", {}), ("b", {"memory": small()}), ("c", {})):
        recipe = EdgeMoEGenerate(**{**vars(SHORT), "temperature": None if name == "c" else 0.8})
        run(folder / name, recipe, **options)
        texts.append((folder / name / "text.txt").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_store_or_a_directory_in_place_of_the_byte_model(folder):
    source = saved(folder / "model", "olmoe")
    store = convert(source, folder / "store", bits=32)
    alone, _, _ = run(folder / "a", byte_moe={}, bits=None, store=str(store))
    assert "loss_in_memory" not in alone
    both, _, _ = run(folder / "b", byte_moe={}, path=str(source))
    assert both["loss_difference"] == 0 and both["loss"] == alone["loss"]


def test_pieces_of_a_window_say_what_the_whole_says(folder):
    model = ByteMoE(**TINY).build()
    batch = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    whole = mean_loss(lambda ids: model(input_ids=ids).logits, batch)
    assert mean_loss(in_pieces(model, 5), batch) == pytest.approx(whole, rel=1e-5)


# ------------------------------------------------------------------ the store of a model


def test_a_model_is_converted_once_and_again_when_the_store_is_damaged(cache, capsys):
    component = EdgeMoEStore(byte_moe=TINY, bits=32, context=64)
    first = component.folder()
    assert "converting the model once" in capsys.readouterr().err
    assert component.folder() == first and "converting" not in capsys.readouterr().err
    others = [EdgeMoEStore(byte_moe=TINY, bits=4), EdgeMoEStore(byte_moe={**TINY, "seed": 1}, bits=32)]
    assert len({first, *(o.folder() for o in others)}) == 3
    index = (first / "index.json").read_text()
    (first / "index.json").write_text(index[:-9])
    capsys.readouterr()
    assert component.folder() == first and (first / "index.json").read_text() == index
    assert "the cached store is damaged and made again" in capsys.readouterr().err


def test_a_directory_that_has_changed_is_converted_anew(cache):
    source = saved(cache / "model", "olmoe")
    first = EdgeMoEStore(path=str(source)).folder()
    assert EdgeMoEStore(path=str(source)).folder() == first
    saved(source, "olmoe", max_position_embeddings=32)
    assert EdgeMoEStore(path=str(source)).folder() != first


def test_policies_and_their_options_reach_the_engine(folder):
    write_frequencies(folder / "uses.json", {(0, 1): 1.0})
    given = GIVEN | {"memory": small()}
    model = EdgeMoEStore(**given, policy="static", frequencies=str(folder / "uses.json"))
    with model.build() as engine:
        assert engine.cache.policy.name == "static"
    assert set(model.inputs()) == {"frequencies"}
    with EdgeMoEStore(**given, policy="paper_intent", freq_source="online").build() as engine:
        assert engine.cache.policy.name == "paper_intent"


def test_sources_of_guesses_reach_the_engine(folder):
    given = GIVEN | {"memory": small()}
    with EdgeMoEStore(**given).build() as engine:
        uses = engine.cache.recorded = []
        engine.generate(torch.tensor([[5]]), 12)
        split = next(n for n in range(4, len(uses)) if uses[n][0] == 0)
        trace = RoutingTrace(2, 16, (1, 1), tuple(uses[:split]), tuple(uses[split:]))
    write_trace(folder / "own.csv.gz", trace)
    model = EdgeMoEStore(**given, prefetch="oracle", trace=str(folder / "own.csv.gz"))
    with model.build() as engine:
        assert set(model.inputs()) == {"trace"} and engine.ahead.source.tokens[0][1] == [
            e for n, e in uses[split: split + 4] if n == 1]
    with EdgeMoEStore(**given, prefetch="lookahead").build() as engine:
        assert type(engine.ahead.source).__name__ == "LookAhead"


def test_a_run_that_reads_ahead_says_the_same(folder):
    plain, rows, _ = run(folder / "plain", memory=small())
    ahead, more, _ = run(folder / "ahead", memory=small(), prefetch="lookahead")
    assert ahead["loss"] == plain["loss"] and len(rows) == len(more)
    texts = [(folder / name / "text.txt").read_bytes() for name in ("plain", "ahead")]
    assert texts[0] == texts[1]


def test_the_kernel_is_an_option_and_reference_is_another_one(folder):
    packed = {"bits": 4, "hot": "raw", "group": 32}
    losses = {name: run(folder / name, kernel=name, **packed)[0]["loss"] for name in ("auto", "reference")}
    assert abs(losses["auto"] - losses["reference"]) < 1e-4
    for kernel, fast in (("auto", True), ("reference", False)):
        with EdgeMoEStore(**GIVEN | packed, kernel=kernel).build() as engine:
            assert engine.cache.forms.fast == fast
    with pytest.raises(ConfigError, match="kernel=c cannot be used with this store"):
        EdgeMoEStore(**GIVEN, kernel="c").build()


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(("options", "words"), [
    ({"store": "s", "bits": 4}, "bits=4 has no effect beside store=s"),
    ({"store": "s", "path": "p"}, "path=p has no effect beside store=s"),
    ({"path": "p", "byte_moe": {"layers": 2}}, "byte_moe has no effect beside path=p"),
    ({"byte_moe": {"layer": 2}}, "byte_moe has no option 'layer'; did you mean 'layers'"),
    ({"byte_moe": {"top": 9}}, "top=9 exceeds experts=8"),
    ({"bits": 32, "group": 8}, "group=8 has no effect: 16 and 32 bits are not quantized"),
    ({"scheme": "sym_channel", "group": 8}, "group=8 has no effect: scheme sym_channel does not take it"),
    ({"bits": 32, "hot": "bf16"}, "hot=bf16 has no effect"),
    ({"memory": "1GB", "total": "2GB"}, "memory and total are both given"),
    ({"policy": "lur"}, "policy='lur' is none of .*did you mean 'lru'"),
    ({"policy": "lru", "frequencies": "f.json"}, "policy 'lru' has no option 'frequencies'"),
    ({"freq_source": "online"}, "policy 'expected' has no option 'freq_source'"),
    ({"prefetch": "oracle"}, "prefetch=oracle needs a trace"),
    ({"prefetch": "lookahead", "trace": "t.csv.gz"}, "trace=t.csv.gz has no effect: only prefetch=oracle"),
    ({"prefetch": "ahead"}, "prefetch='ahead' is not"),
])
def test_options_that_change_nothing_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        EdgeMoEStore(**options)


@pytest.mark.parametrize(("words", "told"), [
    (["model=byte_moe"], "model=byte_moe is not served from disk: write model=edgemoe_store"),
    (["data=none", "model=edgemoe_store"], "data=none: recipe=edgemoe_generate needs a data"),
    (["model=none"], "model=none: recipe=edgemoe_generate needs a model"),
    (["model=edgemoe_store", "quantizer=absmax"], "quantizer=absmax has no effect: recipe="),
    (["model=edgemoe_store", "adapter=bone"], "adapter=bone has no effect"),
    (["model=edgemoe_store", "model.context=100"],
     "model.context=100 is too short: recipe.prompt_length=64 and max_new_tokens=128, or length=64"),
    (["model=edgemoe_store", "recipe=finetune"], "model=edgemoe_store is for serving, but recipe=finetune"),
])
def test_parts_that_do_not_fit_are_refused_before_anything_is_loaded(words, told):
    with pytest.raises(ConfigError) as caught:
        build_parts(compose(["recipe=edgemoe_generate", "data=sotu", *words]).config)
    assert told in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------ the demonstration


def test_the_demonstrations_share_a_model_and_half_of_it_is_enough(tmp_path):
    """Bytes of the model in fp32 are known before it is trained; the limit is at most half of them."""
    bits, text = (compose([f"experiment=edgemoe_{n}_demo"]).config.model for n in ("bits", "generate"))
    options = {k: v for k, v in bits.items() if k != "entry"}
    assert options == {**vars(ByteMoE()), **text["byte_moe"]}
    sizes = {k: v for k, v in options.items() if k not in ("steps", "batch_size", "lr")}
    model = small_moe.untrained(**sizes)
    size, limit = sum(p.nbytes for p in model.parameters()), parse_bytes(text["memory"])
    assert size == 3_706_176 and size - 1000 <= 2 * limit <= size
    assert {k: text[k] for k in ("bits", "policy", "hot")} == {"bits": 32, "policy": None, "hot": None}
    store = convert(model, tmp_path / "store", bits=32)
    budget = plan_memory(store, memory=text["memory"], context=text["context"])
    assert budget.total <= limit and 0 < share_kept(read_index(store), budget) < 0.5


@pytest.mark.slow
def test_the_demonstration_as_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = poise.run(["experiment=edgemoe_generate_demo", "threads=1", "hydra.run.dir=run"])
    metrics = json.loads(Path("run/summary.json").read_text())["metrics"]
    assert metrics["loss_difference"] == 0 and 2 * metrics["memory_bytes"] <= metrics["in_memory_bytes"]
    assert metrics["machine/grown_of_limit"] <= 1 and run is not None
