"""Plans keep their budgets, are measured, meet no other model, and the paper's way ends where it should."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import contents, saved
from profiled import SMALL, by_hand, text, trained

from poise.cli.main import main
from poise.errors import ConfigError, FileError
from poise.models.tokenizers import ByteTokenizer
from poise.quantizers import AbsMax, quantize_model
from poise.testing.families import tiny
from poise_edgemoe import allocate, convert, load_plan, load_profile, profile
from poise_edgemoe.store.index import EXPERTS, read_index
from poise_edgemoe.widths.choice import Limits, table_of
from poise_edgemoe.widths.paper import by_loss
from poise_edgemoe.widths.plan import Plan

few = settings(max_examples=80, deadline=None, derandomize=True, database=None)
WIDTHS = (2, 3, 4, 8, 16)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # matrices of several pages: widths differ in bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a directory of a model that has learned a little, a text, and its profile.

    Its scheme is the paper's, which loses enough at 2 bits to be seen.
    """
    folder = tmp_path_factory.mktemp("allocations")
    trained().save_pretrained(folder / "model")
    ByteTokenizer().save(folder / "model")
    speeches(folder / "text.txt")
    profile(folder / "model", folder / "text.txt", out=folder / "profile.json", scheme="sym_channel",
            windows=24, held_out=8, length=64)
    return folder


def speeches(path):
    from poise.registry import build

    path.write_text("\n\n".join(e.completion for e in build("data", "sotu").load(0).test[:60]))


@pytest.fixture(scope="module")
def found(place):
    return load_profile(place / "profile.json")


# ------------------------------------------------------------------ budgets


@st.composite
def profiles(draw):
    count = draw(st.integers(1, 6))
    layers = sorted(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    layers = [sorted({*layers}).index(n) for n in layers]
    steps = st.lists(st.integers(1, 9), min_size=5, max_size=5)
    nbytes = [[int(x) * 4096 for x in np.cumsum(draw(steps))] for _ in range(count)]
    damages = [draw(st.lists(st.integers(0, 50), min_size=5, max_size=5)) for _ in range(count)]
    reads = draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    return by_hand(nbytes, [[d / 7 for d in one] for one in damages], layers=layers,
                   reads=[r / 8 for r in reads])


def least(found, objective, low=0):
    return sum(cost(e, min(b for b in WIDTHS if b >= low), objective) for e in found.entries)


def cost(entry, bits, objective):
    return entry.nbytes[bits] * (1 if objective == "bytes" else max(entry.reads, 0.5 / 100))


def spent(found, plan, objective):
    return sum(cost(e, plan[f"l{e.layer}.experts.{e.expert}.down"], objective) for e in found.entries)


@few
@given(profiles(), st.sampled_from(["hull", "exact", "paper"]), st.sampled_from(["bytes", "reads"]),
       st.floats(0, 1), st.booleans())
def test_no_plan_is_above_its_budget(found, method, objective, share, fill):
    low, high = least(found, objective), least(found, objective, 16)
    budget = int(low + share * (high - low)) + 1
    if fill and method == "hull":
        plan = allocate(found, bytes=budget, method=method, objective=objective, fill=True)
    else:
        plan = allocate(found, bytes=budget, method=method, objective=objective)
    assert spent(found, plan, objective) <= budget * (1 + 1e-9)
    assert len(plan) == 2 * len(found.entries) and {*plan.values()} <= {*WIDTHS}
    assert plan.report["bytes"] == spent(found, plan, "bytes")
    assert plan.report["bound"] <= plan.report["damage"] + 1e-9


@few
@given(profiles(), st.sampled_from(["hull", "exact"]), st.sampled_from([3, 4, 8]), st.floats(0, 1))
def test_limits_of_widths_are_kept_everywhere_or_at_the_ends(found, method, low, share):
    for limit in ({"min_bits": low}, {"ends": low}):
        base, high = least(found, "bytes", low), least(found, "bytes", 16)
        plan = allocate(found, bytes=int(base + share * (high - base)), method=method, **limit)
        last = max(e.layer for e in found.entries)
        for e in found.entries:
            bits = plan[f"l{e.layer}.experts.{e.expert}.down"]
            assert bits >= low or ("ends" in limit and e.layer not in (0, last))
        assert spent(found, plan, "bytes") <= base + share * (high - base)


def test_ties_give_the_lower_layer_and_number_its_bits():
    same = by_hand([[1, 2, 3, 4, 5]] * 4, [[9.0, 5.0, 3.0, 1.0, 0.0]] * 4, layers=[0, 0, 1, 1])
    plan = allocate(same, bytes=6)
    assert [plan[f"l{n}.experts.{e}.down"] for n in (0, 1) for e in (0, 1)] == [3, 3, 2, 2]


def test_the_paper_takes_two_neighbouring_widths_and_the_least_important_first():
    found = by_hand([[1, 2, 3, 4, 5]] * 4, [[d, 0, 0, 0, 0] for d in (4.0, 1.0, 3.0, 2.0)],
                    increases=[0.4, -0.1, 0.1, 0.2])
    plan = allocate(found, bytes=8, method="paper")
    assert [plan[f"l0.experts.{e}.down"] for e in range(4)] == [4, 2, 2, 4]
    assert plan.report["paper"] == {"widths": [2, 4], "K": 2}


@pytest.mark.parametrize(("options", "words"), [
    ({}, "neither bytes nor loss is given"), ({"bytes": 5, "loss": "2%"}, "bytes and loss are both given"),
    ({"bytes": 5, "method": "best"}, "method='best' is not allowed: it must be one of hull, exact, paper"),
    ({"bytes": 5, "objective": "speed"}, "objective='speed' is not allowed"),
    ({"bytes": 1}, "a budget of 1 is too small: reachable are 2 to 10 bytes of experts"),
    ({"bytes": 1, "method": "exact"}, "reachable are 2 to 10 bytes of experts"),
    ({"bytes": 1, "method": "paper"}, "reachable are 2 to 10 bytes of experts"),
    ({"bytes": 0, "objective": "reads"}, "reachable are 2 to 10 bytes of experts that a token reads"),
    ({"bytes": "many"}, "'many' is no number of bytes"),
    ({"bytes": 5, "min_bits": 5}, "min_bits=5 is none of"),
    ({"bytes": 5, "ends": True}, "ends=True is none of"), ({"loss": "0%"}, "loss='0%' is not allowed"),
    ({"loss": "two"}, "loss='two' is not allowed"), ({"loss": True}, "loss=True is not allowed"),
    ({"loss": 2.0}, "the profile was made from a live one: give model="),
    ({"bytes": 5, "method": "exact", "fill": True}, "fill=True has no effect"),
])
def test_options_that_are_not_allowed_are_refused_in_words(options, words):
    found = by_hand([[1, 2, 3, 4, 5]] * 2, [[4.0, 3.0, 2.0, 1.0, 0.0]] * 2)
    with pytest.raises(ConfigError, match=re.escape(words)):
        allocate(found, **options)


# ------------------------------------------------------------------ the paper's way


class Curve:
    """Losses of a curve over how many experts are narrow, and by uniform width."""

    def __init__(self, uniform, narrow):
        self.uniform, self.narrow, self.asked = uniform, narrow, []

    def percent(self, bits):
        widths = sorted(bits.values())
        if widths[0] == widths[-1]:
            return self.uniform[widths[0]]
        k = sum(b == widths[0] for b in widths) // 2
        self.asked.append(k)
        return self.narrow[k]


def _paper(losses, limit):
    count = len(losses) - 1
    found = by_hand([[1, 2, 3, 4, 5]] * count, [[float(x), 0, 0, 0, 0] for x in range(count)])
    curve = Curve({2: losses[-1], 4: losses[0], 8: 0.0, 16: 0.0}, losses)
    chosen, said = by_loss(found, table_of(found, Limits(), "bytes", (2, 4, 8, 16)), limit, curve)
    return chosen, said, curve


@few
@given(st.lists(st.integers(0, 100), min_size=3, max_size=20), st.integers(0, 100))
def test_of_rising_losses_the_largest_k_that_keeps_the_limit_is_found(losses, limit):
    losses = [x / 10 for x in sorted(losses)]
    limit = max(limit / 10, losses[0])
    chosen, said, curve = _paper(losses, limit)
    best = max(k for k, loss in enumerate(losses) if loss <= limit)
    assert said["K"] == best == (chosen == 0).sum()
    assert chosen.tolist() == [0] * best + [chosen.max()] * (len(losses) - 1 - best)
    assert {k for k, _ in said["measured"]} >= {*curve.asked} and not said["not_monotone"]
    assert [loss for k, loss in said["measured"] if 0 < k < len(losses) - 1] == \
        [losses[k] for k, _ in said["measured"] if 0 < k < len(losses) - 1]
    assert len(curve.asked) <= np.log2(len(losses)) + 5


@few
@given(st.lists(st.integers(1, 100), min_size=3, max_size=20), st.integers(1, 100))
def test_of_noisy_losses_k_keeps_the_limit_and_falls_are_told_of(losses, limit):
    losses = [0.0, *(x / 10 for x in losses)]
    _, said, _ = _paper(losses, limit / 10)
    measured = dict(map(tuple, said["measured"]))
    assert measured.get(said["K"], losses[-1]) <= limit / 10
    falls = [[a, b] for (a, x), (b, y) in zip(said["measured"], said["measured"][1:]) if y < x]
    assert said["not_monotone"] == falls


def test_the_next_three_of_k_are_looked_at():
    _, said, _ = _paper([0.0, 1.0, 2.0, 9.0, 9.0, 3.0, 9.0, 9.0, 9.0], 4.0)
    assert said["K"] == 5 and [k for k, _ in said["measured"] if 2 <= k <= 5] == [2, 3, 4, 5]
    assert [4, 5] in said["not_monotone"]


def test_a_limit_that_no_width_keeps_says_what_can_be_reached():
    found = by_hand([[1, 2, 3, 4, 5]] * 2, [[1.0] * 5] * 2)
    curve = Curve({2: 9.0, 4: 5.0, 8: 3.0, 16: 3.0}, [])
    with pytest.raises(ConfigError, match=r"loss=2% cannot be reached: uniform widths have 3% to 9%"):
        by_loss(found, table_of(found, Limits(), "bytes", (2, 4, 8, 16)), 2.0, curve)


# ------------------------------------------------------------------ measured


@pytest.mark.parametrize("method", ["hull", "exact", "paper"])
def test_a_loss_is_kept_as_measured_and_both_sums_are_recorded(method, place, found):
    c = found.measured["calibration"]
    narrow = c["2"]["badness"] - c["reference"]["badness"]
    limit = 100 * (np.exp(narrow) - 1) / 4
    plan = allocate(place / "profile.json", loss=float(limit), method=method)
    verified = plan.report["verified"]
    assert verified["calibration"]["loss_percent"] <= limit
    assert plan.report["bytes"] < sum(e.nbytes[16] for e in found.entries)
    assert plan.report["additive"]["measured"] == verified["calibration"]["increase"]
    assert plan.report["additive"]["predicted"] == plan.report["damage"]
    if method == "paper":
        k, pairs = plan.report["paper"]["K"], dict(map(tuple, plan.report["paper"]["measured"]))
        assert pairs[k] == verified["calibration"]["loss_percent"] <= limit
    else:
        assert plan.report["met"] and 1 <= len(plan.report["rounds"]) <= 4


def test_a_loss_that_cannot_be_kept_says_the_range(place):
    with pytest.raises(ConfigError, match=r"loss=1e-07% cannot be reached: reachable are .*% \(widest\)"):
        allocate(place / "profile.json", loss=1e-7)


def test_a_plan_is_measured_as_its_store_is(place, found, tmp_path):
    """What the report says of held-out text is what an engine computes of the store."""
    from poise_edgemoe import Engine
    from poise_edgemoe.widths.metrics import cross_entropy
    from poise_edgemoe.widths.texts import windows_of

    plan = allocate(found, bytes=sum(e.nbytes[3] for e in found.entries))
    store = convert(place / "model", tmp_path / "store", plan=plan, scheme="sym_channel", hot="raw")
    assert (store / EXPERTS).stat().st_size == plan.report["bytes"]
    windows = windows_of(place / "text.txt", ByteTokenizer(), 257, windows=24, held_out=8, length=64,
                         seed=0)
    with Engine.open(store, context=64, batch=8, kernel="reference") as engine:
        loss = float(cross_entropy(engine, windows.held_out).mean())
    assert loss == pytest.approx(plan.report["verified"]["held_out"]["badness"], abs=1e-6)


def test_the_same_seeds_give_the_same_plan_and_store(place, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plan = allocate(place / "profile.json", bytes="150kB")
        plan.save(tmp_path / name / "plan.json")
        convert(place / "model", tmp_path / name / "store", scheme="sym_channel",
                plan=load_plan(tmp_path / name / "plan.json"))
    assert contents_of(tmp_path / "a") == contents_of(tmp_path / "b")


def contents_of(folder):
    return [p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()]


def test_a_plan_without_its_model_is_not_measured_and_says_so(found):
    plan = allocate(found, bytes="150kB", verify=False)
    assert plan.report["verified"] is None
    import dataclasses

    gone = dataclasses.replace(found, model_source="/gone")
    assert allocate(gone, bytes="150kB") == plan
    with pytest.raises(ConfigError, match="/gone is not there: give model="):
        allocate(gone, bytes="150kB", verify=True)


def test_other_models_and_other_data_are_refused(place, found, tmp_path):
    with pytest.raises(ConfigError, match="the profile was made from another model"):
        allocate(found, bytes="150kB", model=saved(tmp_path / "other", "mixtral"))
    with pytest.raises(ConfigError, match="the data are not those of the profile"):
        allocate(found, bytes="150kB", data=text(tmp_path, paragraphs=200))


# ------------------------------------------------------------------ whom a plan meets


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """A small random model, its plan in a file, and the plan."""
    folder = tmp_path_factory.mktemp("plans")
    saved(folder / "model", "mixtral", **WIDE)
    made = profile(folder / "model", text(folder), rounding="weighted", **{**SMALL, "group": 32})
    plan = allocate(made, bytes=sum(e.nbytes[2] + e.nbytes[4] for e in made.entries) // 2, verify=False)
    assert {2, 3} & {*plan.values()}
    plan.save(folder / "plan.json")
    return folder, plan


def test_a_plan_is_cores_own_json(little):
    folder, plan = little
    said = json.loads((folder / "plan.json").read_text())
    assert said == dict(plan) and {*said.values()} <= {*WIDTHS}
    model = tiny("mixtral", **WIDE)
    made = quantize_model(model, AbsMax(bits=4, group=32), said)
    assert {*made["quantized"]} == {k for k, b in said.items() if b != 16}
    read = load_plan(folder / "plan.json")
    assert isinstance(read, Plan) and read == plan and read.facts == plan.facts
    assert read.moments.keys() == plan.moments.keys()
    assert all(torch.equal(v, plan.moments[k]) for k, v in read.moments.items())


@pytest.mark.parametrize(("options", "seed", "words"), [
    ({}, 1, "the plan was made for another model"),
    ({"num_local_experts": 5}, 0, "the plan is of other experts: the plan does not name "
                                  "model.layers.0.mlp.experts.4.down"),
    ({"num_local_experts": 3}, 0, "the model lacks model.layers.0.mlp.experts.3.down"),
    ({"num_experts_per_tok": 1}, 0, "the plan was made for another model"),
])
def test_a_plan_meets_no_other_model(options, seed, words, little, tmp_path, capsys):
    folder, plan = little
    other = tiny("mixtral", seed, **WIDE, **options)
    with pytest.raises(ConfigError, match=re.escape(words)):
        convert(other, tmp_path / "store", plan=plan, group=32)
    other.save_pretrained(tmp_path / "other")
    code = main(["moe", "convert", str(tmp_path / "other"), str(tmp_path / "store"), "--plan",
                 str(folder / "plan.json"), "--group", "32"])
    assert code == 2 and words in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_a_plan_of_another_scheme_is_refused(little, tmp_path):
    folder, plan = little
    with pytest.raises(ConfigError, match="the plan is of scheme=asym_group group=32, not of"):
        convert(folder / "model", tmp_path / "store", plan=plan)


@pytest.mark.parametrize(("change", "kind", "words"), [
    (lambda f: (f / "plan.report.json").write_text("{}"), FileError, "is no report of a plan"),
    (lambda f: (f / "plan.json").write_text("[]"), ConfigError, "holds no plan"),
    (lambda f: (f / "plan.json").write_text('{"*": "affine"}'), ConfigError, "which is no number of bits"),
    (lambda f: (f / "plan.json").write_text('{"a'), FileError, "is not valid JSON"),
    (lambda f: (f / "plan.moments.safetensors").write_bytes(b"torn"), FileError, "is torn"),
    (lambda f: (f / "plan.moments.safetensors").unlink(), FileError, "cannot read"),
])
def test_a_plan_whose_files_are_torn_is_refused(change, kind, words, little, tmp_path):
    _, plan = little
    plan.save(tmp_path / "plan.json")
    change(tmp_path)
    with pytest.raises(kind, match=words):
        load_plan(tmp_path / "plan.json")


def test_weighted_scales_take_the_same_bytes_in_the_same_form(little, tmp_path):
    folder, plan = little
    read = load_plan(folder / "plan.json")
    weighted = convert(folder / "model", tmp_path / "weighted", plan=read, group=32)
    nearest = convert(folder / "model", tmp_path / "nearest", plan=dict(plan), group=32)
    a, b = read_index(weighted), read_index(nearest)
    assert a.quantizers == b.quantizers and a.layers != b.layers
    assert [m.nbytes for *_, p in a.blobs() for m in p.values()] == \
        [m.nbytes for *_, p in b.blobs() for m in p.values()]
    one, two = tiny("mixtral", **WIDE), tiny("mixtral", **WIDE)
    quantize_model(one, AbsMax(bits=4, group=32), plan.quantizers())
    plain = {k: getattr(q, "plain", q) for k, q in plan.quantizers().items()}
    quantize_model(two, AbsMax(bits=4, group=32), plain)
    two.load_state_dict(one.state_dict())  # the formats are the same
    assert contents(weighted).keys() == contents(nearest).keys()


# ------------------------------------------------------------------ the command line


def test_from_a_directory_to_a_store_by_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "model", "mixtral")
    text(tmp_path)
    small = ["--windows", "4", "--held-out", "2", "--length", "16"]
    assert main(["moe", "profile", "model", "--data", "text.txt", "--out", "profile.json", *small]) == 0
    out = capsys.readouterr().out
    assert "as trained" in out and "16 bits" in out and (tmp_path / "profile.route.csv.gz").is_file()
    for budget in (["--loss", "2%"], ["--loss", "2%", "--objective", "reads"], ["--bytes", "100kB"],
                   ["--speed", "60kB", "--method", "exact", "--plot", "map.png"]):
        assert main(["moe", "allocate", "profile.json", *budget]) == 0
        assert "MB of experts" in capsys.readouterr().out
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert main(["moe", "convert", "model", "store", "--plan", "plan.json"]) == 0
    report = json.loads((tmp_path / "plan.report.json").read_text())["report"]
    assert (tmp_path / "store" / EXPERTS).stat().st_size == report["bytes"] and report["reads"] <= 60_000


@pytest.mark.parametrize(("argv", "words"), [
    (("profile", "m"), "moe profile needs --data FILE"),
    (("profile", "m", "--data", "t"), "moe profile needs --out profile.json"),
    (("profile", "gone", "--data", "t", "--out", "p.json"), "gone has no config.json"),
    (("profile", "m", "--data", "t", "--out", "p.json", "--damage", "x"), "Profile.damage='x' is not"),
    (("allocate", "p.json"), "no budget is given: give one of --loss 2%, --bytes 900MB, --speed 40MB"),
    (("allocate", "p.json", "--loss", "2%", "--bytes", "1MB"), "--loss and --bytes are given"),
    (("allocate", "p.json", "--bytes", "1MB", "--objective", "reads"), "--objective reads has no effect"),
    (("allocate", "gone.json", "--loss", "2%"), "cannot read gone.json"),
    (("allocate", "p.json", "--losss", "2%"), "did you mean '--loss'?"),
])
def test_a_wrong_word_of_the_new_verbs_is_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["moe", *argv]) != 0
    err = capsys.readouterr().err
    assert words in err and err.strip().count("\n") == 0


# ------------------------------------------------------------------ T28


@pytest.mark.slow
def test_two_bits_chosen_by_sensitivity_beat_two_bits_at_random(tmp_path):
    """The same bytes, a trained model, five seeds: half of the experts at 2 bits, half at 4."""
    from poise_edgemoe import ByteMoE
    from poise_edgemoe.widths.verifying import verifier

    speeches(tmp_path / "text.txt")
    model, wins, chosen, drawn = ByteMoE().build(), 0, [], []
    from contextlib import ExitStack

    for seed in range(5):
        made = profile(model, tmp_path / "text.txt", seed=seed, windows=48, held_out=64)
        half = sum(e.nbytes[2] + e.nbytes[4] for e in made.entries) // 2
        plan = allocate(made, bytes=half, method="paper")
        names = [e.name for e in made.entries]
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        low = {names[x] for x in order[: plan.report["paper"]["K"]]}
        bits = {(e.layer, e.expert, p): 2 if e.name in low else 4 for e in made.entries for p in e.parts}
        with ExitStack() as stack:
            random = verifier(stack, made, None, None, None, None, lambda *_: None, needed=True)
            assert random is not None
            drawn.append(random.full(bits)["held_out"]["increase"])
        chosen.append(plan.report["verified"]["held_out"]["increase"])
        wins += chosen[-1] < drawn[-1]
    assert sum(chosen) < 0.7 * sum(drawn) and wins >= 4, (chosen, drawn)


def test_a_table_of_a_profile_with_a_damaged_number_is_refused():
    with pytest.raises(ConfigError, match="negative or not finite"):
        table_of(by_hand([[1, 2, 3, 4, 5]], [[float("nan")] * 5]), Limits(), "bytes")
