"""The engine says what transformers says, bit for bit, whatever it keeps, reads late, or reads twice."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import random
import re
import threading
import time

import pytest
import torch
from cases import some
from moe_models import FAMILIES, RAW, ids, reference, saved

from poise.errors import ConfigError, DataError, FileError, PoiseError, RunError
from poise.quantizers import AbsMax, Affine, PackedEmbedding
from poise.testing import check_served
from poise.testing.families import tiny
from poise.walk import weights
from poise_edgemoe.budget import parse_bytes, plan_memory, resident_bytes
from poise_edgemoe.cache import make_policy, simulate
from poise_edgemoe.cache.policies import POLICIES
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.engine import Engine
from poise_edgemoe.store.index import EXPERTS, read_index
from poise_edgemoe.store.writer import convert


def store_of(folder, family="mixtral", bits=32, dtype=torch.float32, **options):
    """Convert a tiny model; return the store and the directory of the model."""
    source = saved(folder / "model", family, dtype, **options)
    return convert(source, folder / "store", bits=bits, group=8), source


def opened(store, experts=None, policy="expected", kernel="reference", **options):
    """Open a store with room for that many of its largest experts; None: for all. Exact, if not said."""
    own = {k: options.pop(k) for k in ("direct", "prefetch", "trace") if k in options}
    budget = plan_memory(store, **{"batch": 3, "context": 64} | options)
    own |= {k: options[k] for k in ("base_share",) if k in options}
    if experts is not None:
        largest = max(size_of(m) for _, _, m in read_index(store).blobs())
        budget = dataclasses.replace(budget, experts=budget.staging + experts * largest)
    return Engine(store, budget, policy, kernel=kernel, **own)


def decoder(family, rows):
    return (ids(rows, 5, 1),) if family == "switch_transformers" else ()


# ------------------------------------------------------------------ exact


# every family, every precision, and every share of what fits
BITS = some(itertools.product(FAMILIES, (torch.float32, torch.bfloat16), (1, 3, None)),
            keep=[*((f, torch.float32, 1) for f in FAMILIES), ("olmoe", torch.float32, None),
                  ("mixtral", torch.bfloat16, 3), ("gpt_oss", torch.bfloat16, 3),
                  ("switch_transformers", torch.bfloat16, None)])


@pytest.mark.parametrize(("family", "dtype", "experts"), BITS)
def test_a_raw_store_gives_the_bits_of_transformers(family, dtype, experts, tmp_path):
    store, source = store_of(tmp_path, family, RAW[dtype], dtype)
    plain = reference(source, dtype)
    with opened(store, experts) as engine:
        for rows in (1, 3):
            got, want = (s.logits(ids(rows), *decoder(family, rows)) for s in (engine, plain))
            assert got.dtype == dtype and torch.equal(got, want)
            assert torch.equal(engine.generate(ids(rows), 12), plain.generate(ids(rows), 12))
        assert engine.cache.mapped <= max(engine.cache.budget, 0)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_a_quantized_store_gives_the_bits_of_the_dequantized_model(family, bits, tmp_path):
    source = saved(tmp_path / "model", family)
    store = convert(source, tmp_path / "store", bits=bits, group=8, hot="raw")
    plain = reference(source)
    for w in weights(plain.model):
        if w.role == "expert":
            w.write(Affine(bits, 8).quantize(w.read()).dequantize())
    with opened(store, 2) as engine:
        more = decoder(family, 2)
        assert torch.equal(engine.logits(ids(2), *more), plain.logits(ids(2), *more))
        assert torch.equal(engine.generate(ids(2), 12), plain.generate(ids(2), 12))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", some(["olmoe", "gpt_oss", "switch_transformers"], keep=["gpt_oss"]))
def test_matrices_that_c_makes_give_the_bits_of_those_that_torch_makes(family, bits, tmp_path, monkeypatch):
    """Large ones are made in C, one after the other in one place."""
    store, _ = store_of(tmp_path, family, bits=bits, dtype=torch.bfloat16)
    found = []
    for large in (1, 1 << 40):
        monkeypatch.setattr("poise.quantizers.matrix.LARGE", large)
        with opened(store, 2) as engine:
            found.append((engine.logits(ids(2), *decoder(family, 2)), engine.generate(ids(), 12)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("hot", some([8, 4], keep=[4]))
@pytest.mark.parametrize("family", FAMILIES)
def test_hot_weights_may_be_packed_too(family, hot, tmp_path):
    source = saved(tmp_path / "model", family)
    store = convert(source, tmp_path / "store", bits=32, hot=hot)
    plain = reference(source, torch.bfloat16)
    packed = read_index(store).hot["packed"]
    assert {"shared", "model.embed_tokens"} & set(packed)
    for w in weights(plain.model):
        if w.name in packed:
            w.write(Affine(hot, 64).quantize(w.read()).dequantize())
    other = convert(source, tmp_path / "other")
    sizes = [sum(p.stat().st_size for p in s.glob("hot*")) for s in (store, other)]
    with opened(store, 2) as engine:
        more = decoder(family, 2)
        got, want = engine.logits(ids(2), *more), plain.logits(ids(2), *more)
        assert (got - want).float().abs().mean() <= 0.02 * want.float().abs().mean()
        assert sum(w.stored is not None for w in weights(engine.model)) == len(packed) > 0
    assert sizes[0] < sizes[1] or hot == 8  # rows of 16 have as many scales as those of 64


@pytest.mark.parametrize("family", ["granitemoe", "mixtral"])
def test_a_packed_table_that_is_tied_is_the_output_layer_too(family, tmp_path):
    source = saved(tmp_path / "model", family, tie_word_embeddings=True)
    store = convert(source, tmp_path / "store", bits=16, hot=8)
    plain = reference(source, torch.bfloat16)
    for w in weights(plain.model):
        if w.name in read_index(store).hot["packed"]:
            w.write(Affine(8, 64).quantize(w.read()).dequantize())
    with opened(store, 2, kernel="reference") as engine:
        table, head = engine.model.get_input_embeddings(), engine.model.get_output_embeddings()
        assert isinstance(table, PackedEmbedding) and head.packed is table.packed
        assert torch.equal(engine.logits(ids(2)), plain.logits(ids(2)))
        assert torch.equal(engine.generate(ids(), 8), plain.generate(ids(), 8))


@pytest.mark.parametrize("quantizer", [AbsMax(4, group=16), Affine(3, group=8)])
def test_hot_weights_are_packed_by_any_registered_quantizer(quantizer, tmp_path):
    source = saved(tmp_path / "model", "qwen2_moe")
    store = convert(source, tmp_path / "store", bits=16, hot=quantizer)
    index = read_index(store)
    assert index.hot["quantizer"]["bits"] == quantizer.bits and index.hot["packed"]
    with opened(store, 2) as engine:
        found = [w for w in weights(engine.model) if w.name in index.hot["packed"]]
        plain = {w.name: w for w in weights(reference(source, torch.bfloat16).model)}
        for w in found:
            assert torch.equal(w.read(), quantizer.quantize(plain[w.name].read()).dequantize())
        assert len(found) == len(index.hot["packed"]) and engine.logits(ids(2)).isfinite().all()


@pytest.mark.parametrize("family", some(["olmoe", "switch_transformers"], keep=["olmoe"]))
def test_the_engine_keeps_the_contract_of_served_models(family, tmp_path):
    store, source = store_of(tmp_path, family)
    assert check_served(lambda: opened(store, 2), reference(source))[-1] == "closes"


def test_a_prompt_in_pieces_says_the_same_to_rounding(tmp_path, monkeypatch):
    monkeypatch.setattr("poise_edgemoe.budget.MOST_CHUNK", 4)
    store, source = store_of(tmp_path, "qwen3_moe")
    with opened(store, 2) as engine, reference(source) as plain:
        (_, ours), (_, theirs) = (s.source.start(ids(2, 21)) for s in (engine, plain))
        got, want = ours(ids(2, 21)), theirs(ids(2, 21))
        assert engine.budget.chunk == 4 and (got - want).abs().max() <= 1e-5 * want.abs().max()
        got, want = engine.logits(ids(2, 21)), plain.logits(ids(2, 21))
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_every_call_took_sums_to_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("poise_edgemoe.statistics.LAST", 8)
    store, _ = store_of(tmp_path)
    with opened(store, 2) as engine:
        engine.generate(ids(2, 9), 5)
        whole = engine.stats()
        steps = whole["steps"]
        assert [s["tokens"] for s in steps] == [18, 2, 2, 2, 2]
        for name in ("tokens", "hits", "misses", "bytes_read", "stall_seconds", "major_faults"):
            assert whole[name] == pytest.approx(sum(s[name] for s in steps)), name
        assert all(0 <= s["stall_seconds"] <= s["seconds"] and s["misses"] > 0 for s in steps)
        engine.generate(ids(), 12)
        assert len(engine.stats()["steps"]) == 8 and engine.stats()["tokens"] == 26 + 20


@pytest.mark.parametrize("policy", list(POLICIES))
def test_output_does_not_depend_on_who_leaves(policy, tmp_path):
    store, source = store_of(tmp_path, "qwen3_moe")
    if policy == "static":
        with pytest.raises(ConfigError, match="needs frequencies"):
            opened(store, policy=policy)
        return
    with opened(store, 4, policy=policy) as engine:
        assert torch.equal(engine.generate(ids(), 16), reference(source).generate(ids(), 16))


@pytest.mark.parametrize("schedules", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_output_does_not_depend_on_when_reads_arrive(schedules, tmp_path, monkeypatch):
    from poise_edgemoe.store.reader import Reader

    store, source = store_of(tmp_path, "olmoe")
    want = reference(source).generate(ids(), 8)
    draw, real = random.Random(0), Reader._read

    def late(self, request):
        time.sleep(draw.choice((0, 0, 0.0005, 0.002)))
        real(self, request)

    monkeypatch.setattr(Reader, "_read", late)
    for n in range(schedules):
        with opened(store, 1 + n % 8, direct=bool(n % 2)) as engine:
            assert torch.equal(engine.generate(ids(), 8), want)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "static"])
@pytest.mark.parametrize("experts", some([2, 3, 5, 8], keep=[3]))
def test_engine_and_simulator_count_the_same_hits(policy, experts, tmp_path):
    store, _ = store_of(tmp_path, "qwen3_moe", num_experts=6)
    with opened(store, experts, policy=policy) as engine:
        trace = engine.cache.recorded = []
        engine.generate(ids(), 24)
        engine.generate(ids(3, 11, 1), 12)
        # two prompts: the layer number falls between them, as between tokens
        assert simulate(trace, experts, policy, pins=True).hits == engine.stats()["hits"]
        assert engine.stats()["hits"] + engine.stats()["misses"] == len(trace)


def test_a_policy_that_shares_by_layer_needs_room_in_each(tmp_path):
    store, _ = store_of(tmp_path, "qwen3_moe")
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="leaves no room for an expert of"):
        opened(store, 1, policy="layer_lru")
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("rows", [1, 3])
def test_of_a_prompt_the_last_tokens_experts_stay(rows, tmp_path):
    store, source = store_of(tmp_path, "olmoe", num_experts=12)
    prompt = ids(rows, 40)
    with opened(store, 8) as engine:
        chosen = []
        engine.experts[-1].register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        assert torch.equal(engine.logits(prompt), reference(source).logits(prompt))
        last = set(chosen[0].view(rows, 40, -1)[:, -1].flatten().tolist())
        used = set(chosen[0].flatten().tolist())
        held = {e for n, e in engine.cache.resident if n == 1}
        assert len(used) > 8 >= len(last) and last <= held and len(held) == 8


@pytest.mark.parametrize("policy", ["expected", "layer_lru"])
def test_experts_lend_room_to_a_prompt(policy, tmp_path):
    store, source = store_of(tmp_path, "olmoe", num_experts=12, max_position_embeddings=256)
    prompt, plain = ids(2, 100), reference(source, context=256)
    largest = max(size_of(m) for _, _, m in read_index(store).blobs())
    budget = plan_memory(store, context=256, batch=2)
    # as under a limit: room for some tokens and sixteen experts, and a prompt that takes that of twelve
    budget = dataclasses.replace(budget, experts=budget.staging + 16 * largest,
                                 tokens=200 - 12 * largest // budget.token_bytes)
    with Engine(store, budget, policy) as engine:
        engine.generate(ids(1, 3), 6)
        held, seen = engine.cache.mapped, []
        engine.experts[1].register_forward_pre_hook(lambda *_: seen.append(engine.cache.mapped))
        assert torch.equal(engine.logits(prompt), plain.logits(prompt))
        assert seen[0] + budget.lent(200) <= engine.cache.budget == 16 * largest and held > seen[0]
        assert torch.equal(engine.generate(ids(2, 30), 20), plain.generate(ids(2, 30), 20))
        assert max(seen[1:]) <= 16 * largest < budget.lent(200) + max(seen[1:])
        held = sum(len(r.place) for r in engine.cache.resident.values())
        assert sum(engine.cache._taken.values()) == held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_head_is_exact_too(dtype, tmp_path):
    source = saved(tmp_path / "model", "mixtral", dtype, vocab_size=9001)
    store = convert(source, tmp_path / "store", bits=16)
    with opened(store) as engine:
        assert type(engine.model.lm_head).__name__ == "Head"
        assert torch.equal(engine.logits(ids(2)), reference(source, dtype).logits(ids(2)))


def test_a_stream_that_has_ended_holds_no_keys(tmp_path):
    store, source = store_of(tmp_path, "olmoe")
    with opened(store) as engine:
        held = engine.stream(ids(), 20)
        next(held)
        before = engine._kept
        assert torch.equal(engine.generate(ids(), 9), reference(source).generate(ids(), 9))
        assert before is not engine._kept
        assert all(one.keys is None and not one._places for one in before.layers)
        with pytest.raises(RunError, match="another call has begun since"):
            next(held)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "switch_transformers"])
def test_logits_of_every_decoded_token_are_exact(family, tmp_path):
    store, source = store_of(tmp_path, family, RAW[torch.bfloat16], torch.bfloat16)
    plain = reference(source, torch.bfloat16)
    with opened(store, 3) as engine:
        for rows in (1, 3):
            prompt = ids(rows)
            (_, ours), (_, theirs) = engine.source.start(prompt), plain.source.start(prompt)
            for _ in range(6):
                got, want = ours(prompt), theirs(prompt)
                assert torch.equal(got, want)
                prompt = want.argmax(-1, keepdim=True)


def test_logits_of_a_long_prompt_are_there_once(tmp_path, monkeypatch):
    store, source = store_of(tmp_path, "qwen3_moe", max_position_embeddings=256)
    budget = dataclasses.replace(plan_memory(store, context=256, batch=2), chunk=32, tokens=64)
    monkeypatch.setattr("poise_edgemoe.budget.LEAST_CHUNK", 4)
    room = budget.experts - budget.staging
    assert budget.piece(1) == 32 and dataclasses.replace(budget, logits_bytes=room // 9).piece(1) == 8
    with Engine(store, budget, "lru") as engine:
        got, want = engine.logits(ids(2, 100)), reference(source, context=256).logits(ids(2, 100))
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_policy_serves_one_engine(tmp_path):
    store, _ = store_of(tmp_path, "olmoe")
    rule = make_policy("lru", layers=2, experts=4)
    with opened(store, 2, policy=rule) as engine:
        engine.generate(ids(), 4)
        with pytest.raises(ConfigError, match="another engine's: make a new one"):
            opened(store, 2, policy=rule)


def test_an_engine_that_nobody_closes_ends_with_its_last_name(tmp_path):
    store, _ = store_of(tmp_path, "olmoe")
    opened(store, 2).close()
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        opened(store, 2).generate(ids(), 3)
    gc.collect()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_progress_makes_no_calls(tmp_path):
    store, source = store_of(tmp_path, "olmoe")
    with opened(store, 2) as engine:
        engine.progress = lambda done, of: engine.logits(ids())
        with pytest.raises(RunError, match="within a call of the engine"):
            engine.generate(ids(), 3)
        engine.progress = None
        assert torch.equal(engine.generate(ids(), 3), reference(source).generate(ids(), 3))


def test_a_prompt_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("poise_edgemoe.budget.MOST_CHUNK", 4)
    store, _ = store_of(tmp_path, "qwen3_moe")
    with opened(store) as engine:
        told = []
        engine.progress = lambda *parts: told.append(parts)
        engine.generate(ids(1, 10), 5)
        assert told == [(n, 6) for n in range(7)]  # two layers, three pieces; tokens are not told
        engine.logits(ids(1, 4))
        assert told[7:] == [(0, 2), (1, 2), (2, 2)]


def test_mixed_widths_share_one_budget_and_do_not_empty_it(tmp_path):
    model = tiny("olmoe")
    plan = {f"model.layers.*.experts.{e}.*": (2, 8, 32)[e % 3] for e in range(4)}
    store = convert(model, tmp_path / "store", bits=4, group=8, plan=plan, hot="raw")
    with opened(store, 4) as engine:
        for seed in range(6):
            engine.logits(ids(3, 12, seed))
            held = sum(size_of(store_index.layers[n].experts[e]) for n, e in engine.cache.resident
                       for store_index in (engine.index,))
            assert held <= engine.cache.mapped <= engine.cache.budget and len(engine.cache.resident) >= 3


# ------------------------------------------------------------------ faults


@pytest.mark.parametrize("flips", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_an_error_or_padding(flips, tmp_path):
    store, _ = store_of(tmp_path, "mixtral", bits=4)
    index = read_index(store)
    padding = [(m.offset + m.nbytes, m.offset + -(-m.nbytes // 4096) * 4096)
               for _, _, parts in index.blobs() for m in parts.values()]
    with opened(store) as engine:
        want = engine.logits(ids(3, 20))
        seen = {n: {e for m, e in engine.cache.resident if m == n} for n in range(len(index.layers))}
    assert all(len(s) == 4 for s in seen.values())  # every expert is used
    draw = random.Random(1)
    for _ in range(flips):
        path = store / draw.choice([EXPERTS, EXPERTS, "hot.safetensors", "index.json", "config.json"])
        data, at = bytearray(path.read_bytes()), 0
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        before = path.read_bytes()
        path.write_bytes(data)
        try:
            with opened(store) as engine:
                got = engine.logits(ids(3, 20))
            assert path.name == EXPERTS and any(a <= at < b for a, b in padding), (path.name, at)
            assert torch.equal(got, want)
        except PoiseError as error:
            assert path.name in str(error) or "index" in str(error)
        path.write_bytes(before)


def test_an_index_that_lies_about_a_matrix_is_refused_before_anything_is_read(tmp_path):
    from poise_edgemoe.store.index import _own

    store, _ = store_of(tmp_path, bits=4)
    said = json.loads((store / "index.json").read_text())
    said["layers"][0]["experts"][1]["down"]["nbytes"] -= 64
    said["checksum"] = _own({k: v for k, v in said.items() if k != "checksum"})
    (store / "index.json").write_text(json.dumps(said))
    with pytest.raises(FileError, match="down of expert 1 in layer 0 cannot have"):
        opened(store)


@pytest.mark.parametrize("where", range(0, 100, 5))
def test_a_store_that_is_cut_is_refused_when_it_is_opened(where, tmp_path):
    store, _ = store_of(tmp_path)
    for name in (EXPERTS, "hot.safetensors", "index.json"):
        data = (store / name).read_bytes()
        (store / name).write_bytes(data[: len(data) * where // 100])
        with pytest.raises(FileError, match=name):
            opened(store)
        (store / name).write_bytes(data)


def test_a_file_that_is_cut_or_gone_while_open(tmp_path):
    store, source = store_of(tmp_path)
    want = reference(source).logits(ids())
    with opened(store, 1) as engine:
        data = (store / EXPERTS).read_bytes()
        os.truncate(store / EXPERTS, 4096)
        for _ in range(2):
            with pytest.raises(FileError, match=r"experts.bin ends at .* of expert \d in layer \d"):
                engine.logits(ids())
        with open(store / EXPERTS, "r+b") as f:
            f.write(data)
        assert torch.equal(engine.logits(ids()), want)
        (store / EXPERTS).unlink()  # the open file is still there
        assert torch.equal(engine.logits(ids()), want)


@pytest.mark.parametrize("nth", [1, 50])
def test_a_device_that_fails_is_tried_again_and_then_named(nth, tmp_path, monkeypatch):
    import errno

    store, source = store_of(tmp_path, "olmoe")
    want = reference(source).generate(ids(), 12)
    real, calls, bad = os.preadv, [0], [1]

    def failing(handle, buffers, offset):
        calls[0] += 1
        if calls[0] >= nth and bad[0]:
            bad[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(handle, buffers, offset)

    with opened(store, 2) as engine:
        monkeypatch.setattr(os, "preadv", failing)
        assert torch.equal(engine.generate(ids(), 12), want) and bad == [0]
        calls[0], bad[0] = 0, 99
        with pytest.raises(FileError, match=r"cannot read .* of expert \d in layer \d at \d+ of .*: Input"):
            engine.generate(ids(), 12)
        bad[0] = 0
        assert torch.equal(engine.generate(ids(), 12), want)


def test_short_and_interrupted_reads_are_gone_on_with(tmp_path, monkeypatch):
    store, source = store_of(tmp_path)
    real = os.preadv

    def short(handle, buffers, offset):
        (buffer,) = buffers
        return real(handle, [buffer[:4096]], offset)

    with opened(store, 2) as engine:
        monkeypatch.setattr(os, "preadv", short)
        assert torch.equal(engine.logits(ids()), reference(source).logits(ids()))


# ------------------------------------------------------------------ use


def test_a_limit_that_is_too_small_names_the_smallest_that_is_not(tmp_path):
    store, _ = store_of(tmp_path)
    with pytest.raises(ConfigError, match="memory=1kB is too small: the smallest workable value") as e:
        Engine.open(store, memory="1kB")
    least = int(re.search(r"value is (\d+)MB", str(e.value))[1])
    Engine.open(store, memory=f"{least}MB").close()
    with pytest.raises(ConfigError, match="memory and total are both given"):
        Engine.open(store, memory="1GB", total="2GB")
    with pytest.raises(ConfigError, match=r"total=1MB is too small: the smallest workable value is \d+MB"):
        Engine.open(store, total="1MB")


@pytest.mark.parametrize(("said", "meant"), [
    ("900MB", 900 * 10**6), ("4 GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("12kB", 12000), (77, 77),
    ("900M", 900 * 10**6), (" 900 mb ", 900 * 10**6), ("4g", 4 * 10**9), ("2mib", 2**21), ("5b", 5)])
def test_bytes_are_written_as_people_write_them(said, meant):
    assert parse_bytes(said) == meant


@pytest.mark.parametrize("said", ["much", "-3MB", "1TB", "", "MB", True, "1e3MB", "1.5", 1.5, "4X", "3 i"])
def test_what_is_no_number_of_bytes_is_refused(said):
    with pytest.raises(ConfigError, match="no number of bytes: write 900MB"):
        parse_bytes(said)


@pytest.mark.parametrize(("options", "words"), [
    ({"policy": "lur"}, "policy='lur' is none of .*did you mean 'lru'"),
    ({"kernel": "fast"}, "kernel='fast' is not allowed"),
    ({"context": 0}, "context=0 is not allowed: it must lie between 1 and 64"),
    ({"context": 65}, "context=65 is not allowed"),
    ({"batch": 0}, "batch=0 is not allowed"),
])
def test_an_option_that_is_not_allowed_is_named(options, words, tmp_path):
    store, _ = store_of(tmp_path)
    with pytest.raises(ConfigError, match=words):
        Engine.open(store, **options)


def test_more_rows_than_it_was_opened_for_are_refused(tmp_path):
    store, _ = store_of(tmp_path)
    with Engine.open(store) as engine:
        for call in (lambda: engine.logits(ids(2)), lambda: engine.generate(ids(2), 2)):
            with pytest.raises(DataError, match="2 rows at a time, and the engine was opened for batch=1"):
                call()


def test_a_stream_ends_when_another_call_begins(tmp_path):
    store, _ = store_of(tmp_path)
    with opened(store, 2) as engine:
        running = engine.stream(ids(), 8)
        next(running)
        engine.generate(ids(), 2)
        with pytest.raises(RunError, match="another call has begun since"):
            next(running)


def test_threads_take_turns_and_a_fork_is_refused(tmp_path):
    store, source = store_of(tmp_path)
    want, got = reference(source).generate(ids(), 8), []
    with opened(store, 2) as engine:
        threads = [threading.Thread(target=lambda: got.append(engine.generate(ids(), 8))) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(got) == 3 and all(torch.equal(g, want) for g in got)
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                engine.stats()
                said = b"used"
            except RunError as error:
                said = str(error).encode()
            engine.close()
            os.write(write, said)
            os._exit(0)
        os.waitpid(child, 0)
        assert b"belongs to the process that opened it" in os.read(read, 999)
        os.close(read)
        os.close(write)
        assert torch.equal(engine.generate(ids(), 8), want)


def test_two_engines_serve_one_store(tmp_path):
    store, source = store_of(tmp_path)
    want = reference(source).logits(ids())
    with opened(store, 2) as a, opened(store, 3) as b:
        assert torch.equal(a.logits(ids()), want) and torch.equal(b.logits(ids()), want)


def test_an_exception_within_a_forward_leaves_the_engine_usable(tmp_path, monkeypatch):
    store, source = store_of(tmp_path, "olmoe")
    want = reference(source).generate(ids(), 8)
    from poise_edgemoe.experts import StoredExperts

    real, calls = StoredExperts._experts, [0]

    def interrupted(self, *given):
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return real(self, *given)

    with opened(store, 2) as engine:
        monkeypatch.setattr(StoredExperts, "_experts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ids(), 8)
        assert torch.equal(engine.generate(ids(), 8), want)


@pytest.mark.parametrize("tokens", some([240, 10_000], keep=[240]))
def test_nothing_grows_over_many_tokens(tokens, tmp_path):
    store, _ = store_of(tmp_path, "olmoe", max_position_embeddings=256)

    def held():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd")), resident_bytes()

    with opened(store, 3, context=256) as engine:
        engine.generate(ids(), 240)
        before = held()
        for _ in range(tokens // 240):
            engine.generate(ids(), 240)
        after = held()
        assert after[:2] == before[:2] and after[2] - before[2] < 4 * 2**20
        stats = engine.stats()
        assert stats["hits"] + stats["misses"] > 0 and stats["bytes_read"] > 0 and 0 < stats["hit_rate"] < 1
