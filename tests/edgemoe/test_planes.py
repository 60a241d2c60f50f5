"""Stores in two planes: both are the ordinary store, and a base is the middle of what it may be."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import time

import numpy as np
import pytest
import torch
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import FAMILIES, contents, ids, saved
from test_engine import opened
from test_fast import decoded
from test_store_index import altered

from poise.errors import ConfigError, FileError, RunError
from poise.quantizers import AbsMax, Affine
from poise.quantizers.packing import pack, unpack
from poise.testing.families import tiny
from poise_edgemoe import Engine, convert, open_streamed
from poise_edgemoe.baselines import open_baseline
from poise_edgemoe.cache.allowance import WINDOW, Allowance
from poise_edgemoe.cache.planes import Apart
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.store import folding
from poise_edgemoe.store.index import EXPERTS, INDEX, LOW, PAGE, padded, read_index
from poise_edgemoe.store.inspecting import table
from poise_edgemoe.store.planes import in_planes
from poise_edgemoe.store.reader import Reader

CAUSAL = [f for f in FAMILIES if f != "switch_transformers"]


def both(folder, family="olmoe", bits=4, *, scheme="asym_group", dtype=torch.float32, **options):
    """Return the store of a tiny model, and the same in planes."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    heads = {} if family.startswith("deepseek") else {"head_dim": 32}
    source = saved(folder / "model", family, dtype, **wide | heads | options)
    how = {"bits": bits, "scheme": scheme, "hot": "raw", **({"group": 32} if "group" in scheme else {})}
    return convert(source, folder / "plain", **how), convert(source, folder / "planes", planes=2, **how)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return both(tmp_path_factory.mktemp("planes"))


@pytest.fixture
def copy(stores, tmp_path):
    return shutil.copytree(stores[1], tmp_path / "copy")


# ------------------------------------------------------------------ what is in it

KEPT = [("gpt_oss", 4, "asym_group"), ("deepseek_v3", 4, "asym_group"), ("olmoe", 8, "asym_group"),
        ("mixtral", 4, "sym_channel")]


@pytest.mark.parametrize("half", [2, 4])
@pytest.mark.parametrize("native", [True, False])
def test_halves_of_codes_make_the_codes(half, native, monkeypatch):
    if not native:
        monkeypatch.setattr(folding, "_LOADED", type("None_", (), {"get": lambda self: None})())
    elif folding._LOADED.get() is None:
        pytest.skip("there is no compiler")
    seeded = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4**half, (7, 48), generator=seeded, dtype=torch.uint8)
    high, low = (pack(part, half).numpy().reshape(-1) for part in (codes >> half, codes & (2**half - 1)))
    made = np.zeros(2 * len(high), np.uint8)
    folding.merge(high, low, made, half)
    assert np.array_equal(made, pack(codes, 2 * half).numpy().reshape(-1))


@pytest.mark.parametrize("scheme", [Affine, AbsMax])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 0), (4, -1), (8, 64), (8, 0)])
def test_a_base_is_the_middle_of_what_it_may_be(scheme, bits, group):
    quantizer = scheme(bits=bits, group=group)
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    made, planed = quantizer.quantize(weight), in_planes(quantizer, "w", (6, 40))
    high, low = planed.split(made)
    assert {n: (tuple(t.shape), t.dtype) for n, t in high.items()} == planed.high((6, 40), torch.float32)
    assert {n: (tuple(t.shape), t.dtype) for n, t in low.items()} == planed.low((6, 40), torch.float32)
    base = planed.base(high, (6, 40), torch.float32, torch.empty(2 * high["scale"].numel())).dequantize()
    half, kept = bits // 2, unpack(made.codes, bits, 40)
    found = []
    for rest in range(2**half):  # every matrix that has this base
        codes = (kept >> half << half) + rest
        found.append(quantizer.from_tensors({**made.tensors(), "codes": pack(codes, bits)}, (6, 40),
                                            torch.float32).dequantize())
    assert torch.allclose(base, (found[0] + found[-1]) / 2, rtol=1e-5, atol=1e-6)
    spread = 2 ** (half - 1) * torch.stack(found).diff(dim=0).amax()
    assert (base - weight).abs().max() <= spread  # half a coarse step, and half a fine one


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_bases_of_an_expert_come_first_and_each_plane_begins_at_a_page(family, bits, tmp_path):
    plain, planes = (read_index(store) for store in both(tmp_path, family, bits))
    assert (plain.planes, planes.planes) == (1, 2)
    ordinary = sum(size_of(m) for _, _, m in plain.blobs())
    assert sum(size_of(m) for _, _, m in planes.blobs()) <= ordinary + 2 * PAGE * len(list(plain.blobs()))
    for n, e, parts in planes.blobs():
        assert list(parts) == ["gate_up", "down", "gate_up_low", "down_low"]
        assert all(m.offset % PAGE == 0 for m in parts.values())
        for part, whole in plain.layers[n].experts[e].items():
            codes = planes.layers[n].shapes[part][0] * planes.layers[n].shapes[part][1] * bits // 16
            assert parts[part + LOW].nbytes == codes and parts[part].nbytes == whole.nbytes - codes


def test_a_conversion_is_the_same_twice_and_goes_on_where_it_was(stores, tmp_path, monkeypatch):
    from poise_edgemoe.store import writer

    source, how = stores[0].parent / "model", {"bits": 4, "group": 32, "hot": "raw", "planes": 2}
    write, calls = writer.write_layer, []

    def fails(*given):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*given)

    monkeypatch.setattr(writer, "write_layer", fails)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "store", **how)
    assert convert(source, tmp_path / "store", **how) and len(calls) == 3
    assert contents(tmp_path / "store") == contents(stores[1])


def test_a_table_says_what_is_in_planes(stores):
    assert "gate_up_low, 4 bits, affine, group 32, 2 planes" in table(stores[1])


# ------------------------------------------------------------------ exact without a quality budget


@pytest.mark.parametrize(("family", "bits", "scheme"), some([
    *((f, 4, "asym_group") for f in CAUSAL), ("olmoe", 8, "asym_group"), ("gpt_oss", 8, "sym_group"),
    ("mixtral", 4, "sym_channel"), ("qwen3_moe", 4, "asym_channel")], KEPT))
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_both_planes_give_the_bits_of_the_ordinary_store(family, bits, scheme, kernel, tmp_path):
    plain, planes = both(tmp_path, family, bits, scheme=scheme)
    for experts, rows in ((1, 1), (3, 3), (None, 1)):
        with opened(plain, experts, kernel=kernel) as want, opened(planes, experts, kernel=kernel) as got:
            assert torch.equal(got.logits(ids(rows)), want.logits(ids(rows)))
            assert torch.equal(decoded(got, rows), decoded(want, rows))
            assert got.stats()["hits"] == want.stats()["hits"]
            assert got.stats()["planes"]["from_base"] == 0


def test_scales_beyond_fp16_are_kept_in_full(tmp_path):
    model = tiny("olmoe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] *= 1e7
    stores = [convert(model, tmp_path / f"{n}", bits=4, group=8, hot="raw", planes=n) for n in (1, 2)]
    assert {q["scale_dtype"] for q in read_index(stores[1]).quantizers} == {"float16", "float32"}
    found = []
    for store in stores:
        with opened(store, 2) as engine:
            found.append(engine.logits(ids()))
    assert torch.equal(*found)
    with opened(stores[1], 2, base_share=1.0) as engine:
        assert decoded(engine).isfinite().all() and engine.stats()["planes"]["from_base"]


# ------------------------------------------------------------------ served from bases


def test_a_base_that_serves_is_the_base_and_nothing_else_changes(stores):
    """An ordinary engine in which every miss of a decoded token is multiplied by what a base means."""
    plain, planes = stores
    with opened(planes, 3, base_share=1.0) as engine, opened(plain, 3) as other:
        missed, cache = set(), other.cache
        begun, ask, matrix = cache._begun, cache._ask, cache._matrix

        def noted(key, place):
            if cache.length == 1:
                missed.add(key)
            return begun(key, place)

        def coarse(held, part):
            whole, bias = matrix(held, part)
            if held.key not in missed:
                return whole, bias
            fine, high = whole.scale.float(), unpack(whole.codes, 4, whole.shape[1]) >> 2
            return dataclasses.replace(whole, codes=pack(high, 2), bits=2, scale=4 * fine,
                                       minimum=whole.minimum.float() + 1.5 * fine), bias

        cache._begun, cache._matrix = noted, coarse
        cache._ask = lambda n, keys: (missed.clear(), ask(n, keys))[1]
        want, got = decoded(other), decoded(engine)
        assert torch.equal(got, want)
        said = engine.stats()["planes"]
        assert said["from_base"] > 5
        assert sum(s["from_base"] for s in engine.stats()["steps"]) == said["from_base"]
    with opened(planes, 3) as engine:
        assert not torch.equal(decoded(engine), want)  # or the test says nothing


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize(("family", "rows", "prefetch"), [
    ("olmoe", 1, "none"), ("gpt_oss", 1, "none"), ("deepseek_v2", 1, "none"), ("mixtral", 3, "none"),
    ("olmoe", 1, "lookahead")])
def test_no_moment_of_an_answer_goes_beyond_the_budget(family, rows, prefetch, kernel, tmp_path):
    _, store = both(tmp_path, family)
    with opened(store, 3, kernel=kernel, base_share=0.2, prefetch=prefetch) as engine:
        allowance, used, seen = engine.cache.allowance, engine.cache.used, []

        def noted(n, experts, missing=0):
            seen.append((allowance.answer_uses, allowance.answer_taken))
            return used(n, experts, missing)

        engine.cache.used = noted
        for _ in range(2):
            decoded(engine, rows, new=12)
            last = engine.stats()["planes"]
            seen.append((last["answer_uses"], last["answer_from_base"]))
        assert all(taken <= 0.2 * uses + 1e-6 for uses, taken in seen)
        stats = engine.stats()
        assert 0 < last["answer_from_base"] < last["from_base"] == stats["planes"]["from_base"]
        assert last["answer_uses"] * 2 == last["uses"] == sum(
            s["hits"] + s["misses"] for s in stats["steps"] if s["tokens"] == rows)
        engine.logits(ids(rows))
        assert engine.stats()["planes"]["answer_uses"] == 0  # prompts are answered in full
        assert engine.cache.mapped <= engine.cache.budget


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.lists(st.tuples(st.integers(0, 700), st.integers(0, 30)), max_size=30))
def test_what_is_not_taken_in_time_is_lost(share, stretches):
    it, uses, taken, marks = Allowance(share), 0, 0, [(0, 0)]
    for used, wanted in stretches:
        it.earn(used)
        taken += sum(it.take() for _ in range(wanted))
        uses += used
        marks.append((uses, taken))
    assert taken <= share * uses + 1e-6
    for n, (a, b) in enumerate(marks):
        assert all(d - b <= max(share * (c - a + WINDOW), share * (c - a) + 1) + 1e-6 for c, d in marks[n:])


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_no_delay_changes_an_answer(stores, kernel, monkeypatch):
    found, read = [], Reader._read_some
    for slow in (None, LOW, ""):

        def late(self, request, *given, slow=slow):
            name = next(iter(request.matrices))
            if request.through is None and slow == (LOW if name.endswith(LOW) else ""):
                time.sleep(0.003)
            return read(self, request, *given)

        monkeypatch.setattr(Reader, "_read_some", late)
        with opened(stores[1], 3, kernel=kernel, base_share=0.5) as engine:
            found.append((decoded(engine), engine.stats()["planes"]["from_base"]))
    assert all(torch.equal(logits, found[0][0]) and n == found[0][1] for logits, n in found)


def test_what_refines_a_base_may_never_come_until_it_is_needed(stores, monkeypatch):
    """A reader that serves only those who wait: a second use asks for the rest, and has all of it."""

    def next_(self):
        with self._wake:
            while not (self._demand or self._closed):
                self._wake.wait(0.001)
            if self._closed:
                for left in (*self._demand, *self._prefetch):
                    left.error = RunError("closed")
                    left.done.set()
                return None
            return self._demand.popleft()

    with opened(stores[1], 3, base_share=1.0) as engine:
        want = decoded(engine)
    monkeypatch.setattr(Reader, "_next", next_)
    with opened(stores[1], 3, base_share=1.0) as engine:
        after, seen = engine.cache.next_token, []

        def next_token():
            apart = [h for h in engine.cache.resident.values() if isinstance(h, Apart)]
            seen.extend(h.whole or h.requests[1].done.is_set() for h in apart)
            after()

        engine.cache.next_token = next_token
        assert torch.equal(decoded(engine), want)
        said = engine.stats()["planes"]
        assert False in seen and 0 < said["dropped"] <= said["from_base"]


def test_bytes_that_were_read_are_those_of_planes(stores):
    index = read_index(stores[1])
    base = sum(padded(m.nbytes) for p, m in index.layers[0].experts[0].items() if not p.endswith(LOW))
    whole = size_of(index.layers[0].experts[0])
    with opened(stores[1], 2, base_share=1.0) as engine:
        decoded(engine)
        settled = [h.settle() for h in engine.cache.resident.values()]
        stats = engine.stats()
        bases, dropped = stats["planes"]["from_base"], stats["planes"]["dropped"]
        assert len(settled) == 2 and bases >= dropped
        full = stats["misses"] - bases
        assert stats["bytes_read"] == full * whole + bases * base + (bases - dropped) * (whole - base)


# ------------------------------------------------------------------ what goes wrong


def fails(part, times):
    """Return a reader's way to read, of which the first reads that begin with some part fail."""
    read, left = Reader._read_some, [times]

    def some(self, request, *given):
        if next(iter(request.matrices)) == part and request.through is None and left[0]:
            left[0] -= 1
            raise FileError(f"cannot read {request.at(given[0])}: {os.strerror(errno.EIO)}")
        return read(self, request, *given)

    return some


def test_a_rest_that_could_not_be_read_behind_is_read_again_when_it_is_needed(stores, monkeypatch):
    with opened(stores[1], None, base_share=1.0) as engine:
        want = decoded(engine)
    monkeypatch.setattr(Reader, "_read_some", fails("gate_up_low", 1))
    with opened(stores[1], None, base_share=1.0) as engine:
        assert torch.equal(decoded(engine), want)
    monkeypatch.setattr(Reader, "_read_some", fails("gate_up_low", 1000))
    with opened(stores[1], None, base_share=1.0) as engine:
        with pytest.raises(FileError, match=r"cannot read gate_up_low of expert \d in layer \d"):
            decoded(engine)
        monkeypatch.undo()
        assert decoded(engine).isfinite().all()


def test_a_base_that_cannot_be_read_is_an_error_and_the_engine_goes_on(stores, monkeypatch):
    monkeypatch.setattr(Reader, "_read_some", fails("gate_up", 1))
    with opened(stores[1], 3, base_share=1.0) as engine:
        with pytest.raises(FileError, match=r"cannot read gate_up of expert \d in layer \d"):
            decoded(engine)
        assert engine.cache._used is None and not engine.cache._coarse and not engine.cache._pinned
        first = decoded(engine)
        assert torch.equal(first[:, 0], decoded(engine)[:, 0])


@pytest.mark.parametrize("part", ["gate_up", "down", "gate_up_low", "down_low"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_flipped_bit_of_either_plane_is_named(part, share, copy):
    at = read_index(copy).layers[1].experts
    for one in at:  # whichever is used
        with open(copy / EXPERTS, "r+b") as f:
            f.seek(one[part].offset + one[part].nbytes - 1)
            byte = f.read(1)[0]
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte ^ 1]))
    with opened(copy, 3, base_share=share) as engine:
        with pytest.raises(FileError, match=rf"altered: the checksum of {part} of expert \d+ in layer 1"):
            decoded(engine, new=40)
        assert engine.stats()["tokens"]


def test_flipped_padding_is_nobody_s(copy):
    one = read_index(copy).layers[0].experts[0]["gate_up"]
    assert one.nbytes < padded(one.nbytes)
    with open(copy / EXPERTS, "r+b") as f:
        f.seek(one.offset + padded(one.nbytes) - 1)
        f.write(b"x")
    with opened(copy, 2, base_share=0.5) as engine:
        assert decoded(engine).isfinite().all()


def test_a_torn_plane_is_refused(copy):
    with open(copy / EXPERTS, "r+b") as f:
        f.truncate((copy / EXPERTS).stat().st_size - PAGE)
    with pytest.raises(FileError, match=r"experts.bin is torn"):
        Engine.open(copy)


def low_first(said):
    one = said["layers"][0]["experts"][0]
    said["layers"][0]["experts"][0] = dict(sorted(one.items(), key=lambda item: item[1]["offset"])[::-1])


@pytest.mark.parametrize(("change", "what"), [
    (lambda s: s["layers"][0]["experts"][1].pop("down_low"), "lacks a part"),
    (lambda s: s["quantizers"][0].pop("planes"), "of version"),
    (lambda s: s["quantizers"][0].update(planes=3), "3 planes of experts are not known"),
    (lambda s: s["quantizers"][0].update(planes=True), "True planes of experts"),
    (lambda s: s["quantizers"][0].update(bits=3), "stored by Affine of 3 bits"),
    (lambda s: s["quantizers"][0].update(entry="q4_0"), "planes|q4_0"),
    (lambda s: s["quantizers"][0].update(layout="torch:avx2"), "plain order"),
    (lambda s: s["quantizers"].append({k: v for k, v in s["quantizers"][0].items() if k != "planes"})
     or s["layers"][0]["experts"][1]["down"].update(form=1), "one plane, and others"),
    (lambda s: s.update(version=1), "has version 1, and what it says is of version 2"),
    (lambda s: s.update(version=3), "has version 3; this Poise reads 1 and 2"),
    (low_first, "do not come before|does not begin"),
])
def test_an_index_that_says_something_else_is_refused(change, what, copy):
    altered(copy / INDEX, change)
    with pytest.raises(FileError, match=what) as told:
        Engine.open(copy)
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("how", "what"), [
    ({"planes": 3}, "planes=3 is not allowed: it must be 1, or 2"), ({"planes": True}, "planes=True"),
    ({"planes": "2"}, "planes='2'"), ({"planes": 0}, "planes=0"), ({"planes": None}, "planes=None"),
    ({"bits": 2}, r"does not fit model.layers.0.mlp.experts.0.gate_up, stored by Affine of 2"),
    ({"bits": 3}, "of 3 bits"), ({"bits": 16}, "stored by Raw of 16 bits"), ({"bits": 32}, "Raw of 32"),
    ({"scheme": "q4_0"}, "stored by GgmlQ4 of 4 bits"), ({"layout": "torch"}, "layout=torch"),
    ({"plan": {"*.down": 2}}, "experts.0.down, stored by Affine of 2 bits"),
])
def test_what_has_no_planes_is_refused_before_anything_is_written(how, what, stores, tmp_path):
    with pytest.raises(ConfigError, match=what) as told:
        convert(stores[0].parent / "model", tmp_path / "store", **{"planes": 2} | how)
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_an_encoder_with_a_decoder_and_an_odd_width_have_no_planes(tmp_path):
    with pytest.raises(ConfigError, match="an encoder-decoder"):
        convert(tiny("switch_transformers"), tmp_path / "store", planes=2)
    with pytest.raises(ConfigError, match=r"18 columns wide: .* multiple of 4"):
        in_planes(Affine(bits=4), "w", (4, 18))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf"), True, "0.1", None])
def test_a_share_that_is_none_is_refused(share, stores):
    with pytest.raises(ConfigError, match=r"base_share=.* is not allowed: it must be a number from 0 to 1"):
        Engine.open(stores[1], base_share=share)


def test_stores_that_cannot_serve_bases_say_so(stores):
    with pytest.raises(ConfigError, match=r"base_share=0.5 has no effect: the store has no bases"):
        Engine.open(stores[0], base_share=0.5)
    with Engine.open(stores[0], base_share=0.0) as engine:
        assert engine.stats()["planes"] is None and "bases" not in engine.summary()
    with pytest.raises(ConfigError, match=r"base_share=0.5 cannot be used with kernel torch"):
        Engine.open(stores[1], base_share=0.5, kernel="torch")
    with pytest.raises(ConfigError, match="served and not tuned"):
        open_streamed(stores[1])
    with pytest.raises(ConfigError, match="baseline=STI does not fit"):
        open_baseline("STI", stores[1])


def test_baselines_read_both_planes(stores):
    found = []
    for store in stores:
        for name in ("IO-QFREE", "IO-QEXP"):
            with open_baseline(name, store, kernel="reference") as engine:
                found.append(engine.logits(ids()))
    assert all(torch.equal(one, found[0]) for one in found)


def test_an_answer_says_what_was_served_from_bases(stores):
    with opened(stores[1], 2, base_share=0.5) as engine:
        decoded(engine)
        said = engine.stats()["planes"]
        assert said["answer_share"] == said["answer_from_base"] / said["answer_uses"] <= 0.5
        assert engine.summary().endswith(
            f"of the last answer's {said['answer_uses']} uses of experts {said['answer_from_base']} "
            f"({100 * said['answer_share']:.1f} %) were served from bases")
