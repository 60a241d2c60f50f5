"""The paper's comparison: rows whole, losses those of stores, ratios of rows, resumed, refused in words."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from poise.errors import ConfigError
from poise.interfaces import Parts
from poise.options import options_of
from poise.registry import build
from poise.runs.context import RunContext
from poise_edgemoe import Engine, convert
from poise_edgemoe.components import ByteMoE
from poise_edgemoe.drawn import write_drawn_store
from poise_edgemoe.paper import comparing
from poise_edgemoe.paper.components import EdgeMoEPaper
from poise_edgemoe.paper.figures import ratios, report, summed
from poise_edgemoe.paper.making import at_size, go_on, larger, load_profile
from poise_edgemoe.paper.ways import BY_NAME, WAYS
from poise_edgemoe.store.index import PAGE, padded, read_index

MODEL = ByteMoE(layers=2, experts=4, hidden=32, inner=32, steps=2, length=32, batch_size=2)
RECIPE = EdgeMoEPaper(top=[1], limits=[50, 100], tokens=4, warm=2, prompt_length=8, calibration=2,
                      calibration_tokens=24, windows=3, length=16, hidden=64, inner=64, repeats=1)


def parts_of(model=MODEL, **more):
    return Parts(data=build("data", "sotu"), model=model, **more)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run that is cut short after seven rows and goes on: folder, rows before and after, calls."""
    folder = tmp_path_factory.mktemp("paper")
    context, seen = RunContext(folder, quiet=True), []

    def counted(*given, stop=7):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(given)
        return whole(*given)

    whole, patch = comparing.measured, pytest.MonkeyPatch()
    with patch.context() as p:
        p.setattr(comparing, "measured", counted)
        with pytest.raises(KeyboardInterrupt):
            RECIPE.run(parts_of(), context)
        kept = [json.loads(line) for line in (folder / "work" / "journal.jsonl").read_text().splitlines()]
        profile = load_profile(folder / "work" / "switch" / "group.profile.json")
        p.setattr(comparing, "measured", lambda *given: counted(*given, stop=None))
        metrics = RECIPE.run(parts_of(), context)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return folder, context, kept, rows, metrics, len(seen), profile


def test_there_is_a_row_for_each_way_scale_and_limit(ran):
    folder, _, _, rows, metrics, _, _ = ran
    wanted = [(scale, way.name, limit) for scale in ("trained", "large") for limit in (None, 50, 100)
              for way in WAYS if way.limited == (limit is not None)]
    assert [(r["scale"], r["way"], r["limit"]) for r in rows] == wanted
    for row in rows:
        assert row["tokens"] == 4 and row["tokens_per_second"] > 0 and row["cpu_seconds"] > 0
        assert row["hits"] + row["misses"] == 4 * 2 and row["store_bytes"] > 0
        assert row["memory"] is None or row["budget"] <= row["memory"]
        assert row["bytes_per_token"] > 0 or row["misses"] == 0
    assert not (folder / "work" / "switch").exists()
    assert {f.name for f in (folder / "figures").iterdir()} == {
        "switch_trained_over_limit.png", "switch_trained_parts.png", "switch_large_over_limit.png",
        "switch_large_parts.png", "switch_loss_against_storage.png"}
    assert metrics["switch/loss/IO-FREE"] == rows[0]["loss"]


def test_a_loss_is_that_of_the_store_whatever_is_in_memory(ran):
    losses = {}
    for row in ran[3]:
        if row["scale"] == "trained" and row["limit"] in (None, 100):
            losses.setdefault(BY_NAME[row["way"]].store, set()).add(row["loss"])
    assert all(len(found) == 1 for found in losses.values())  # IO-EXP's is IO-FREE's, bit for bit
    assert losses["raw"] != losses["int4"] != losses["int8"] != losses["raw"]


def test_what_keeps_nothing_reads_all_that_a_token_uses(ran):
    large = {(r["way"], r["limit"]): r for r in ran[3] if r["scale"] == "large"}
    raw = 3 * 64 * 64 * 2  # an expert in 16 bits: three matrices, each of whole pages
    four = 3 * padded(64 * 64 // 2 + 2 * 64, PAGE)
    assert large["IO-EXP", None]["bytes_per_token"] == 2 * raw and large["IO-EXP", None]["hits"] == 0
    assert large["IO-QEXP", None]["bytes_per_token"] == 2 * four
    assert large["IO-FREE", None]["bytes_per_token"] == large["IO-QFREE", None]["bytes_per_token"] == 0


def test_a_run_that_was_cut_short_goes_on(ran):
    _, context, kept, rows, metrics, calls, _ = ran
    before = [line["value"] for line in kept[1:] if line["key"].endswith("/0")]
    assert len(before) == 7 and rows[:7] == before  # times, too
    assert calls == len(rows)
    assert RECIPE.run(parts_of(), context) == metrics  # all is there: nothing is measured


def test_a_report_shows_all_of_it(ran):
    _, context, *_ = ran
    run = type("Run", (), {"notes": context.records.notes})
    tables, pictures = report([run])
    assert [title for title, *_ in tables] == [
        "switch, trained experts: tokens a second over the limit",
        "switch, large experts: tokens a second over the limit", "Speed-ups at each limit",
        "What a token takes", "switch: held-out loss against storage"]
    assert all(len(row) == len(columns) for _, columns, rows in tables for row in rows)
    assert len(pictures) == 5 and all(png.startswith(b"\x89PNG") for _, png in pictures)
    assert report([]) == ([], [])


def test_a_profile_at_another_size_has_the_bytes_of_a_store(ran, tmp_path):
    config = larger(MODEL.build().config, 128, 64)
    profile = at_size(ran[-1], config)
    for bits in profile.widths:
        index = read_index(write_drawn_store(tmp_path / f"{bits}", config, bits=bits, distinct=1))
        found = {(n, e): sum(padded(m.nbytes) for m in parts.values()) for n, e, parts in index.blobs()}
        assert {(one.layer, one.expert): one.nbytes[bits] for one in profile.entries} == found


# ------------------------------------------------------------------ ratios


def row(way, speed, limit=None, repeat=0, scale="large", **more):
    return {"model": "top2", "scale": scale, "way": way, "limit": limit, "repeat": repeat, "fits": True,
            "tokens_per_second": speed, "store_bytes": 10, "loss": None} | more


def test_ratios_are_of_medians():
    speeds = {"EdgeMoE": (30.0, 10.0, 12.0), "IO-EXP": (4.0, 3.0, 90.0), "IO-QEXP": (8.0, 8.0, 8.0),
              "ours": (18.0, 18.0, 1.0), "EdgeMoE as printed": (6.0, 6.0, 6.0)}
    rows = [row(way, s, 40 if BY_NAME[way].limited else None, n)
            for way, own in speeds.items() for n, s in enumerate(own)]
    rows += [row("STI-like", None, 40, n, fits=False) for n in range(3)]
    rows += [row("IO-FREE", 1.0, scale="trained", loss=1.5),
             row("ours", 1.0, 40, scale="trained", loss=1.75)]
    found = {k.removeprefix("machine/top2/large/40/"): v for k, v in ratios(summed(rows)).items()
             if k.startswith("machine/top2/large")}
    assert found == {"edgemoe_over_io_exp": 3.0, "edgemoe_over_io_qexp": 1.5, "ours_over_edgemoe": 1.5,
                     "ours_over_io_qexp": 2.25, "literal_over_intent": 0.5}
    assert ratios(summed(rows))["top2/loss/ours"] == 1.75


def test_what_did_not_fit_once_has_no_speed():
    rows = [row("STI-like", None, 40, fits=False), row("EdgeMoE", 2.0, 40)]
    assert ratios(summed(rows)) == {}


def test_texts_go_on_after_their_end(tmp_path):
    """A token that ends a text is drawn sooner or later: no way is measured on fewer tokens for that."""
    model = MODEL.build()
    store = convert(model, tmp_path / "store", bits=32)
    prompt = torch.ones(1, 4, dtype=torch.long)
    with Engine.open(store, context=32) as engine:
        new = engine.generate(prompt, 8)[0, 4:].tolist()
        engine.source = replace(engine.source, end=(new[2],))
        assert engine.generate(prompt, 8).shape[1] < 12
        go_on(engine)
        assert engine.generate(prompt, 8)[0, 4:].tolist() == new


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("options", "said"), [
    ({"limits": [1, 50]}, r"1 % is too small: a token uses 2 of 8 experts.*workable value is 25"),
    ({"top": [5]}, r"recipe.top=\[5\] exceeds model.experts=4"),
    ({"calibration_tokens": 500}, "model.length=32 is too short.*564 tokens"),
])
def test_options_that_do_not_fit_the_model_are_refused(options, said):
    small = {**options_of(RECIPE), "top": [2, 1], "prompt_length": 64, **options}
    with pytest.raises(ConfigError, match=said):
        EdgeMoEPaper(**small).check(parts_of())


@pytest.mark.parametrize(("options", "said"), [
    ({"limits": [120]}, r"limits=\[120\] is not allowed: it must be whole numbers from 1 to 100"),
    ({"limits": []}, r"limits=\[\] is not allowed"),
    ({"top": [1, 1]}, "each once"),
    ({"hidden": 100}, "hidden=100 is not a multiple of 64"),
    ({"loss": 0.0}, "loss"),
])
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        EdgeMoEPaper(**options)


def test_models_without_experts_are_refused():
    parts = parts_of(build("model", "smollm2"), names={"model": "smollm2"})
    with pytest.raises(ConfigError, match=r"model=smollm2 is not allowed.*routed experts.*model=byte_moe"):
        RECIPE.check(parts)
    for kind in ("data", "model"):
        with pytest.raises(ConfigError, match=f"{kind}=none"):
            RECIPE.check(replace(parts_of(), **{kind: None}))
    with pytest.raises(ConfigError, match="has no effect"):
        RECIPE.check(parts_of(quantizer=build("quantizer", "absmax"), names={"quantizer": "absmax"}))


def test_a_limit_that_one_way_cannot_keep_is_said_in_its_row(monkeypatch, tmp_path):
    def refused(*given):
        raise ConfigError("memory=3 is too small: the smallest workable value is 9MB")

    monkeypatch.setattr(comparing, "open_way", refused)
    monkeypatch.setattr(comparing, "read_index", lambda store: type("Index", (), {"files": {}}))
    monkeypatch.setattr(comparing, "memory_at", lambda *given: 3)
    made = type("Made", (), {"stores": {"large": dict.fromkeys(("int4", "ours"), tmp_path)}})
    given = (made, None, "top2", "large", BY_NAME["ours"], 20, 0, RECIPE._settings(), 0)
    assert comparing.measured(*given)["fits"] is False
    monkeypatch.setattr(comparing, "open_way", lambda *given: (_ for _ in ()).throw(ConfigError("other")))
    with pytest.raises(ConfigError, match="other"):
        comparing.measured(*given)


def test_ways_are_those_of_the_paper_and_ours():
    names = [way.name for way in WAYS]
    assert len(set(names)) == len(names) == len(BY_NAME)
    for one, other in itertools.combinations(("EdgeMoE", "EdgeMoE as printed"), 2):
        assert replace(BY_NAME[one], name="", policy="") == replace(BY_NAME[other], name="", policy="")
