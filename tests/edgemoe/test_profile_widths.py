"""A profile says what was measured: against brute force, whoever holds the model, whenever it is killed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import some
from moe_models import FAMILIES, contents, ids, saved
from profiled import SMALL, text, trained

from poise.errors import ConfigError, DataError, FileError
from poise.models.tokenizers import ByteTokenizer
from poise.testing.families import tiny
from poise_edgemoe import Engine, convert, load_profile, profile
from poise_edgemoe.cache.traces import read_trace
from poise_edgemoe.store.index import EXPERTS
from poise_edgemoe.store.schemes import scheme_quantizer
from poise_edgemoe.widths import spool
from poise_edgemoe.widths.identity import identity_of
from poise_edgemoe.widths.journal import Journal
from poise_edgemoe.widths.measuring import Bench
from poise_edgemoe.widths.metrics import cross_entropy, metric_of, rouge2
from poise_edgemoe.widths.opening import identity_of_model
from poise_edgemoe.widths.texts import in_halves, windows_of

TOLD = "poise_edgemoe.widths"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a directory of Mixtral's, and a text."""
    folder = tmp_path_factory.mktemp("profiles")
    saved(folder / "model", "mixtral")
    text(folder)
    return folder


@pytest.fixture(scope="module")
def made(place):
    """The profile of it."""
    return profile(place / "model", place / "text.txt", out=place / "profile.json", **SMALL)


# ------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("family", some(FAMILIES, keep=["gpt_oss", "switch_transformers"]))
def test_a_directory_a_store_and_the_live_model_have_one_profile(family, tmp_path):
    model = tiny(family)
    saved(tmp_path / "model", family)
    convert(tmp_path / "model", tmp_path / "store", bits=32)
    asked = {**SMALL, "windows": 2, "held_out": 1, "widths": [2, 8]}
    found = [profile(m, text(tmp_path), **asked) for m in (tmp_path / "model", tmp_path / "store", model)]
    assert len({p.model["identity"] for p in found}) == 1
    assert found[0].entries == found[1].entries == found[2].entries
    assert found[0].measured == found[1].measured == found[2].measured
    assert all(e.damage[2] > 0 for e in found[0].entries)


def test_the_identity_changes_with_any_weight_and_with_the_configuration():
    same = identity_of_model(tiny("mixtral"), lambda *_: None)
    for name in ("model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.gate.weight",
                 "model.norm.weight"):
        model = tiny("mixtral")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] += 1e-3
        assert identity_of_model(model, lambda *_: None) != same
    assert identity_of_model(tiny("mixtral", num_experts_per_tok=1), lambda *_: None) != same


@pytest.mark.parametrize("per", ["expert", "projection"])
def test_errors_are_those_of_brute_force(per):
    """sum_t g_t^2 ||f(h_t) - f^(h_t)||^2, gates and inputs taken from transformers itself."""
    model, tokens = tiny("mixtral"), ids(length=300)[0]
    asked = {**SMALL, "tokens_per_expert": 10_000, "widths": [2, 4]}
    found = profile(model, tokens, per=per, **asked)
    calibration = windows_of(tokens, None, 257, windows=6, held_out=3, length=16, seed=0).calibration
    given = {}
    for n in (0, 1):
        block = model.model.layers[n].mlp.experts
        block.register_forward_pre_hook(lambda _, args, n=n: given.update({n: args}))
    with torch.no_grad():
        model(input_ids=calibration[:, :-1])
    for entry in found.entries:
        hidden, index, gates = given[entry.layer]
        token, slot = torch.where(index == entry.expert)
        assert entry.tokens == entry.kept == len(token) and entry.reads == len(token) / 96
        block = model.model.layers[entry.layer].mlp.experts
        right = {"gate_up": block.gate_up_proj[entry.expert], "down": block.down_proj[entry.expert]}
        for bits in (2, 4):
            at = scheme_quantizer("asym_group", bits, 8)
            wrong = {p: at.quantize(w).dequantize() if p in entry.parts else w for p, w in right.items()}
            apart = (said(right, hidden[token]) - said(wrong, hidden[token])).detach()
            expected = (gates.detach()[token, slot].square() * apart.square().sum(-1)).sum()
            assert entry.output_error[bits] == pytest.approx(float(expected), rel=1e-3, abs=1e-12)
            square = sum((right[p] - wrong[p]).square().sum() for p in right)
            assert entry.weight_error[bits] == pytest.approx(float(square.detach()), rel=1e-5)


def said(parts, x):
    gate, up = (x @ parts["gate_up"].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ parts["down"].T


@pytest.mark.parametrize("family", some(FAMILIES[:-1], keep=["mixtral", "gpt_oss"]))
def test_a_bench_computes_what_a_converted_store_does(family, tmp_path):
    saved(tmp_path / "model", family)
    raw = convert(tmp_path / "model", tmp_path / "raw", bits=32)
    narrow = convert(raw.parent / "model", tmp_path / "narrow", bits=3, group=8, hot="raw")
    windows = ids(rows=5, length=17)
    with Engine.open(narrow, context=16, batch=5, kernel="reference") as engine:
        expected = cross_entropy(engine, windows)
    with Bench(raw, lambda n, e, p, b: scheme_quantizer("asym_group", b, 8), 16) as bench:
        as_trained = cross_entropy(bench.engine, windows)
        bench.set(bench.uniform(3))
        assert torch.equal(cross_entropy(bench.engine, windows), expected)
        bench.set({})
        assert torch.equal(cross_entropy(bench.engine, windows), as_trained)
    assert not torch.equal(expected, as_trained)


def test_bytes_are_those_of_the_file_that_convert_writes(place, made, tmp_path):
    for n, widths in enumerate(([3] * 8, [2, 16, 4, 8, 16, 2, 3, 3])):
        plan = {f"{e.name}.{p}": b for e, b in zip(made.entries, widths, strict=True) for p in e.parts}
        store = convert(place / "model", tmp_path / f"store{n}", plan=plan, group=8)
        expected = sum(e.nbytes[b] for e, b in zip(made.entries, widths, strict=True))
        assert (store / EXPERTS).stat().st_size == expected


def test_losses_are_those_of_one_narrow_expert_around_the_others(place, made):
    found = profile(place / "model", place / "text.txt", damage="loss", low=2, high=4, **SMALL)
    windows = windows_of(place / "text.txt", ByteTokenizer(), 257, windows=6, held_out=3, length=16, seed=0)
    assert [e.output_error for e in found.entries] == [e.output_error for e in made.entries]
    raw = convert(place / "model", place / "for losses", bits=32)
    with Bench(raw, lambda n, e, p, b: scheme_quantizer("asym_group", b, 8), 16) as bench:
        base = bench.uniform(4)
        bench.set(base)
        before = bench.measure(metric_of("cross_entropy"), windows.calibration).value
        for one in (found.entries[0], found.entries[-1]):
            bench.set({**base, **{(one.layer, one.expert, p): 2 for p in one.parts}})
            after = bench.measure(metric_of("cross_entropy"), windows.calibration).value
            assert one.loss_increase == after - before
            assert one.damage[2] >= max(0.0, after - before) and one.damage[2] > one.damage[4] > 0


def test_experts_without_tokens_are_told_of_and_take_the_median_ratio_of_their_layer(place):
    found = profile(place / "model", place / "text.txt", windows=1, held_out=1, length=4, group=8)
    bare = [e for e in found.entries if not e.tokens]
    assert bare and all(e.name in found.notes[0] for e in bare) and f"{len(bare)} of 8" in found.notes[0]
    for e in bare:
        ratios = [o.output_error[2] / o.weight_error[2] for o in found.entries
                  if o.layer == e.layer and o.tokens]
        assert e.damage[2] > 0
        assert e.output_error[2] == pytest.approx(e.weight_error[2] * torch.tensor(ratios).double()
                                                  .quantile(0.5).item())


def test_damages_sum_up_to_what_the_narrowest_width_adds_or_are_in_nats(made):
    total = sum(e.damage[2] for e in made.entries)
    c = made.measured["calibration"]
    added = c["2"]["badness"] - c["reference"]["badness"]
    expected = added if added > 0 else sum(made.measured["layers"])
    assert total == pytest.approx(expected)


def test_few_tokens_of_an_expert_stand_for_all(place, made):
    few = profile(place / "model", place / "text.txt", tokens_per_expert=5, **SMALL)
    for a, b in zip(few.entries, made.entries, strict=True):
        assert a.tokens == b.tokens and a.kept == min(5, a.tokens)
        assert a.output_error[2] == pytest.approx(b.output_error[2], rel=1.0)


def test_the_trace_is_the_routing_of_all_windows(place, made):
    trace = read_trace(place / "profile.route.csv.gz")
    assert (trace.layers, trace.experts, trace.prompt) == (2, 4, ())
    for e in made.entries:
        assert trace.decode.count((e.layer, e.expert)) == e.tokens
    assert len(trace.decode) == 96 * 2 * 2 and trace == made.trace


# ------------------------------------------------------------------ files


def test_the_same_seed_gives_the_same_file_and_another_one_others(place, made):
    again = profile(place / "model", place / "text.txt", out=place / "again.json", **SMALL)
    other = profile(place / "model", place / "text.txt", seed=1, **SMALL)
    first = (place / "profile.json").read_text().replace("profile.route", "again.route")
    assert first == (place / "again.json").read_text() and again == load_again(made, again)
    assert other.measured["calibration"] != made.measured["calibration"]
    assert other.measured["held_out"] == made.measured["held_out"]
    assert not (place / "again.json.work").exists()


def load_again(made, like):
    import dataclasses

    return dataclasses.replace(made, path=like.path)


def test_a_profile_is_read_as_it_was_written(place, made):
    import dataclasses

    assert dataclasses.replace(load_profile(place / "profile.json"), path=None) == made


class Killed(BaseException):
    """What a kill would be."""


@pytest.mark.parametrize("at", some([1, 7, 12, 20], keep=[7, 20]))
def test_a_killed_profile_goes_on_to_the_same_bytes(at, place, tmp_path, monkeypatch):
    asked = {**SMALL, "rounding": "weighted", "damage": "loss", "widths": [2, 4]}
    profile(place / "model", place / "text.txt", out=tmp_path / "a.json", **asked)
    get, calls = Journal.get, []

    def dying(self, key, make):
        calls.append(key)
        if len(calls) > at:
            raise Killed
        return get(self, key, make)

    with monkeypatch.context() as m:
        m.setattr(Journal, "get", dying)
        with pytest.raises(Killed):
            profile(place / "model", place / "text.txt", out=tmp_path / "b.json", **asked)
    journal = tmp_path / "b.json.work" / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"key": "torn')
    profile(place / "model", place / "text.txt", out=tmp_path / "b.json", **asked)
    assert same(tmp_path)


def same(folder):
    files = contents(folder)
    names = [n for n in files if n.startswith("a.")]
    renamed = [files[n].replace(b'"a.route', b'"b.route').replace(b'"a.moments', b'"b.moments')
               for n in names]
    return len(names) > 1 and renamed == [files["b" + n[1:]] for n in names]


def test_one_that_is_killed_while_windows_pass_through_goes_on(place, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{TOLD}.measuring.TOKENS", 32)  # two windows at a time
    asked = {**SMALL, "tokens_per_expert": 9, "widths": [2, 4]}
    profile(place / "model", place / "text.txt", out=tmp_path / "a.json", **asked)
    write, written = spool.write_bytes, []

    def dying(path, data):
        written.append(path)
        if len(written) == 4:
            raise Killed
        write(path, data)

    with monkeypatch.context() as m:
        m.setattr(spool, "write_bytes", dying)
        with pytest.raises(Killed):
            profile(place / "model", place / "text.txt", out=tmp_path / "b.json", **asked)
    profile(place / "model", place / "text.txt", out=tmp_path / "b.json", **asked)
    assert same(tmp_path)


def test_work_that_was_left_for_another_request_is_not_used(place, made, tmp_path, monkeypatch):
    def dying(*_):
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(f"{TOLD}.profiling.measure_model", dying)
        with pytest.raises(Killed):
            profile(place / "model", place / "text.txt", out=tmp_path / "p.json", seed=3, **SMALL)
    found = profile(place / "model", place / "text.txt", out=tmp_path / "p.json", **SMALL)
    assert found.entries == made.entries and found.measured == made.measured


def test_a_folder_of_somebody_elses_is_left_alone(place, tmp_path):
    (tmp_path / "p.json.work").mkdir()
    (tmp_path / "p.json.work" / "thesis.tex").write_text("years")
    with pytest.raises(FileError, match=r"p\.json\.work is in the way: it holds thesis\.tex"):
        profile(place / "model", place / "text.txt", out=tmp_path / "p.json", **SMALL)
    assert (tmp_path / "p.json.work" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize(("change", "words"), [
    (lambda d: d.update(kind="plan"), "is no profile"),
    (lambda d: d.update(version=2), "has version 2"),
    (lambda d: d.pop("entries"), "it lacks 'entries'"),
    (lambda d: d["entries"][0]["damage"].update({"2": -1.0}), "damage of .* is -1.0"),
    (lambda d: d["entries"][0]["damage"].update({"2": "nan"}), "damage of .* is 'nan'"),
    (lambda d: d["entries"][0]["nbytes"].pop("4"), "nbytes of .* is not of the widths"),
    (lambda d: d["files"].update(moments="../secret"), "only files beside it"),
    (lambda d: d.update(entries=[]), "it has no entries"),
])
def test_a_file_that_is_no_whole_profile_is_refused(change, words, place, made, tmp_path):
    said = json.loads((place / "profile.json").read_text())
    change(said)
    (tmp_path / "p.json").write_text(json.dumps(said))
    with pytest.raises(FileError, match=words):
        load_profile(tmp_path / "p.json")


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("content", "kind", "words"), [
    (b"", DataError, "is empty: give a text to calibrate on"),
    (b" \n\n ", DataError, "is empty"),
    (b"too short", DataError, "the first half, for calibration, has 4 tokens, and 6 windows of 16 need"),
    (b"\xff\xfe\x00", DataError, "is no text in UTF-8"),
    (None, DataError, "cannot read .*gone.txt"),
])
def test_data_that_cannot_be_used_are_refused(content, kind, words, place, tmp_path):
    path = tmp_path / "gone.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=words):
        profile(place / "model", path, **SMALL)


@pytest.mark.parametrize(("options", "words"), [
    ({"widths": [1, 4]}, "width 1 is not allowed"),
    ({"widths": [4]}, r"widths=\[4\] leave no choice"),
    ({"widths": [4, 2]}, r"widths=\[4, 2\] leave no choice"),
    ({"widths": [2, 4], "scheme": "q4_0"}, "width 2: bits=2 is not allowed: q4_0 has 4 bits"),
    ({"scheme": "asymm_group"}, "scheme='asymm_group' is not allowed"),
    ({"damage": "losss"}, "damage='losss' is not allowed: it must be one of weight, output, loss"),
    ({"per": "matrix"}, "per='matrix' is not allowed"),
    ({"rounding": "up"}, "rounding='up' is not allowed"),
    ({"rounding": "weighted", "widths": [4, 8]}, "rounding=weighted has no effect"),
    ({"damage": "loss", "low": 3, "widths": [2, 4]}, "low=3 is none of the widths 2, 4"),
    ({"damage": "loss", "low": 4}, "low=4 must be below high=4"),
    ({"windows": 0}, "windows=0 is not allowed"), ({"length": 513}, "at most 512 tokens"),
    ({"seed": -1}, "seed=-1"), ({"tokens_per_expert": True}, "tokens_per_expert=True"),
    ({"metric": "bleu"}, "metric='bleu' is not allowed"),
    ({"metric": len}, "a metric of one's own needs higher_is_better"),
    ({"metric": "accuracy", "higher_is_better": True}, "higher_is_better=True has no effect"),
    ({"memory": "1kB"}, "memory=1kB is too small: the smallest workable value is"),
])
def test_options_that_are_not_allowed_are_refused(options, words, place):
    with pytest.raises(ConfigError, match=words):
        profile(place / "model", place / "text.txt", **{**SMALL, **options})


def test_models_that_cannot_be_profiled_are_refused(place, tmp_path):
    convert(place / "model", tmp_path / "narrow", bits=4)
    with pytest.raises(ConfigError, match="holds quantized weights"):
        profile(tmp_path / "narrow", place / "text.txt", **SMALL)
    with pytest.raises(FileError, match=r"has no config\.json"):
        profile(tmp_path / "gone", place / "text.txt", **SMALL)
    with pytest.raises(ConfigError, match="is text, and the model has no tokenizer"):
        profile(tiny("mixtral", vocab_size=300), place / "text.txt", **SMALL)
    with pytest.raises(DataError, match="the data hold token 300, and the model knows 257"):
        profile(tiny("mixtral"), torch.full((500,), 300), **SMALL)
    with pytest.raises(DataError, match="data are empty"):
        profile(tiny("mixtral"), torch.tensor([], dtype=torch.long), **SMALL)
    with pytest.raises(DataError, match="data are a list"):
        profile(tiny("mixtral"), [1, 2], **SMALL)


def test_measurements_that_are_not_finite_are_refused():
    model = tiny("mixtral")
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)
        model.model.norm.weight.fill_(1e10)
    with pytest.raises(DataError, match="windows is NaN or Inf: the model cannot be measured"):
        profile(model, ids(length=300)[0], **SMALL)
    with pytest.raises(DataError, match="metric broken gave nan: it must be a finite number"):
        profile(tiny("mixtral"), ids(length=300)[0], metric=broken, higher_is_better=True, **SMALL)


def broken(model):
    return math.nan


# ------------------------------------------------------------------ metrics and windows


def test_metrics_of_all_kinds_are_measured(place):
    def sure(engine):
        return float(engine.logits(ids()).softmax(-1).amax(-1).mean())

    asked = {**SMALL, "widths": [2, 8]}
    for metric, higher in (("accuracy", None), (sure, True)):
        found = profile(trained(), place / "text.txt", metric=metric, higher_is_better=higher, **asked)
        value = -found.measured["calibration"]["reference"]["badness"]
        assert 0 < value < 1 and found.options["higher_is_better"] is True
    with pytest.raises(DataError, match="rouge2 of the model as trained is 0"):
        profile(place / "model", place / "text.txt", metric="rouge2", **asked)


def test_rouge2_counts_pairs_of_words():
    assert rouge2(["the", "cat", "sat", "on"], ["the", "cat", "sat", "on"]) == 1.0
    assert rouge2(["the", "cat", "sat"], ["the", "cat", "ran"]) == 0.5
    assert rouge2(["a"], ["a"]) == rouge2([], ["a", "b"]) == 0.0


def test_loss_in_percent_is_of_perplexity_or_of_the_metric():
    plain, higher = metric_of("cross_entropy"), metric_of("accuracy")
    assert plain.percent(plain.allowed(2.0, 1.5), 1.5) == pytest.approx(2.0)
    assert plain.percent(1.5 + math.log(1.1), 1.5) == pytest.approx(10.0)
    assert higher.percent(-0.219, -0.221) == pytest.approx(0.905, abs=1e-3)  # the paper's 0.89 % of 0.221
    assert higher.percent(higher.allowed(5.0, -0.4), -0.4) == pytest.approx(5.0)


def test_halves_share_no_paragraph_and_windows_do_not_overlap(tmp_path):
    whole = text(tmp_path).read_text()
    first, second = in_halves(whole)
    assert first + second == whole and first.endswith("\n\n") and 0.4 < len(first) / len(whole) < 0.6
    tokens = torch.arange(200)
    found = windows_of(tokens, None, 257, windows=5, held_out=5, length=9, seed=1)
    calibration, held = found.calibration.flatten().tolist(), found.held_out.flatten().tolist()
    assert len({*calibration}) == len(calibration) and len({*held}) == len(held)
    assert max(calibration) < 100 <= min(held)


def test_the_source_of_an_identity_is_read_once_per_layer(place):
    from poise_edgemoe.store.source import open_source

    told = []
    identity_of(open_source(place / "model"), lambda done, of: told.append((done, of)))
    assert told == [(0, 2), (1, 2), (2, 2)]
