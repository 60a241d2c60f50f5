"""Plans of bits per expert: complete, halved, measured in true bytes; the small model is made once."""

from __future__ import annotations

import math

import pytest
import torch

from poise.errors import ConfigError, DataError
from poise.interfaces import Example
from poise.models.components import CausalLM
from poise.models.tokenizers import ByteTokenizer
from poise.options import options_of
from poise.quantizers import AbsMax, Affine, quantize_model
from poise.walk import weights
from poise_edgemoe import (
    ByteMoE,
    EdgeMoEBits,
    expert_errors,
    half_plan,
    random_plan,
    small_moe,
    uniform_plan,
)
from poise_edgemoe.bits import loss_of, measure, summary, text_windows
from poise_edgemoe.widths.plans import experts

TINY = ByteMoE(layers=1, experts=4, hidden=16, inner=16, length=16, steps=2, batch_size=2)


def mixture(name="MixtralForCausalLM", count=4, seed=0):
    torch.manual_seed(seed)
    return CausalLM(architecture=name, hidden_size=16, layers=2, experts=count).build().eval()


def expert_names(model):
    return {w.name for w in weights(model) if w.role == "expert"}


BATCH = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ plans


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM"])
def test_an_expert_is_all_its_matrices(name):
    found = experts(mixture(name))
    assert list(found) == [f"model.layers.{i}.mlp.experts.{e}" for i in (0, 1) for e in range(4)]
    for expert, matrices in found.items():
        assert {w.name for w in matrices} == {f"{expert}.gate_up", f"{expert}.down"}


def test_a_model_without_experts_is_refused():
    dense = CausalLM(architecture="LlamaForCausalLM", hidden_size=16).build()
    for action in (experts, lambda m: uniform_plan(m, 4), lambda m: expert_errors(m, AbsMax(), 2)):
        with pytest.raises(ConfigError, match="no routed experts"):
            action(dense)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_half_plan_names_every_matrix_and_keeps_half_of_the_experts(count):
    model = mixture(count=count)
    errors = expert_errors(model, AbsMax(group=8), 2)
    for plan in (half_plan(model, errors, 4, 2), random_plan(model, 0, 4, 2)):
        assert plan.keys() == expert_names(model)
        bits = {n.rpartition(".")[0]: b for n, b in plan.items()}
        assert all(plan[n] == bits[n.rpartition(".")[0]] for n in plan)  # an expert shares its bits
        assert sorted(bits.values()) == [2] * math.ceil(2 * count / 2) + [4] * (2 * count // 2)
    assert uniform_plan(model, 3) == dict.fromkeys(expert_names(model), 3)


def test_the_half_with_the_larger_errors_keeps_more_bits():
    model = mixture()
    errors = expert_errors(model, AbsMax(group=8), 2)
    plan = half_plan(model, errors, 8, 2)
    kept = {n for n in errors if plan[f"{n}.down"] == 8}
    assert min(errors[n] for n in kept) >= max(errors[n] for n in errors.keys() - kept)


def test_ties_are_broken_by_name():
    model = mixture()
    errors = dict.fromkeys(experts(model), 1.0)
    kept = {n for n, b in half_plan(model, errors, 4, 2).items() if b == 4}
    assert {n.split(".")[2] for n in kept} == {"0"}  # layer 0 sorts first
    assert half_plan(model, dict(reversed(errors.items())), 4, 2) == half_plan(model, errors, 4, 2)


def test_random_plans_are_functions_of_their_seed():
    model = mixture()
    plans = [random_plan(model, s, 4, 2) for s in range(6)]
    assert plans[3] == random_plan(model, 3, 4, 2)
    assert len({tuple(sorted(p.items())) for p in plans}) > 3


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("quantizer", [AbsMax(group=8), Affine(group=16), AbsMax(group=0)])
def test_an_experts_error_shrinks_with_every_bit(quantizer):
    model = mixture()
    by_bits = [expert_errors(model, quantizer, b) for b in range(2, 9)]
    for name in by_bits[0]:
        column = [errors[name] for errors in by_bits]
        assert column == sorted(column, reverse=True) and column[-1] < 0.01 * column[0]


def test_an_experts_error_is_the_squared_difference():
    model = mixture()
    errors = expert_errors(model, AbsMax(bits=8, group=8), 3)
    for name, matrices in experts(model).items():
        want = 0.0
        for w in matrices:
            dense = AbsMax(bits=3, group=8).quantize(w.read()).dequantize()
            want += float(((dense - w.read()).double() ** 2).sum())
        assert errors[name] == pytest.approx(want, rel=1e-5)


# ------------------------------------------------------------------ loss and bytes


def test_measured_bytes_are_those_of_the_packed_tensors():
    model = mixture()
    plan = random_plan(model, 0, 5, 2)
    row = measure(model, AbsMax(group=8), "mixed", plan, BATCH)
    packed = mixture()
    quantize_model(packed, AbsMax(group=8), plan)
    held = sum(
        b.numel() * b.element_size() for name, b in packed.named_buffers()
        if ".experts." in name and not name.endswith("poise_format"))
    assert row["expert_bytes"] == held > 0
    total = sum(w.numel for w in weights(model) if w.role == "expert")
    assert row["bits_per_weight"] == pytest.approx(8 * held / total)
    assert row["loss"] == loss_of(packed, BATCH)


def test_measuring_leaves_the_model_alone():
    model = mixture()
    before = loss_of(model, BATCH)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._experts_implementation
    measure(model, AbsMax(), "two", uniform_plan(model, 2), BATCH)
    assert loss_of(model, BATCH) == before
    assert model.state_dict().keys() == kept.keys()
    assert model.config._experts_implementation == implementation


def test_sixteen_bits_are_the_model_itself():
    model = mixture()
    row = measure(model, AbsMax(), "16_bit", uniform_plan(model, 16), BATCH)
    total = sum(w.numel for w in weights(model) if w.role == "expert")
    assert row["loss"] == loss_of(model, BATCH)
    assert row["bits_per_weight"] == 16 and row["expert_bytes"] == 2 * total


@torch.no_grad()
def test_the_loss_is_the_mean_over_next_tokens():
    model = mixture()
    logits = model(input_ids=BATCH[:, :-1]).logits.log_softmax(-1)
    want = -logits.gather(-1, BATCH[:, 1:, None]).mean()
    assert loss_of(model, BATCH) == pytest.approx(float(want), rel=1e-5)
    assert loss_of(model, BATCH.repeat(7, 1)) == pytest.approx(float(want), rel=1e-5)


def test_windows_are_spread_over_the_whole_text():
    text = [Example("", "".join(chr(97 + i % 26) for i in range(100))), Example("", "z" * 20)]
    stream = torch.tensor([c for e in text for c in e.completion.encode()])
    found = text_windows(text, ByteTokenizer(), 10, 5)
    assert found.shape == (5, 11)
    assert torch.equal(found[0], stream[:11]) and torch.equal(found[-1], stream[-11:])
    with pytest.raises(DataError, match="has 120 tokens, one window needs 200"):
        text_windows(text, ByteTokenizer(), 199, 5)


def test_a_text_of_exactly_one_window_is_enough():
    assert text_windows([Example("", "abcdefghijk")], ByteTokenizer(), 10, 1).shape == (1, 11)


def test_the_summary_compares_the_chosen_half_with_the_mean_of_random_ones():
    rows = [{"plan": p, "loss": v} for p, v in (
        ("4_bit", 1.0), ("half_chosen", 1.5), ("half_random_0", 2.0), ("half_random_1", 3.0))]
    assert summary(rows) == {"loss/4_bit": 1.0, "loss/half_chosen": 1.5, "loss/half_random": 2.5,
                             "chosen_minus_random": -1.0}


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(("component", "options", "words"), [
    (ByteMoE, {"top": 9}, "top=9 exceeds experts=8: lower top"),
    (ByteMoE, {"hidden": 20}, "hidden=20 is not a multiple of 8"),
    (ByteMoE, {"experts": 1}, "ByteMoE.experts=1 is not allowed"),
    (EdgeMoEBits, {"bits": [4, 9]}, r"bits=9 is not allowed: 16 \(as trained\) or 2 to 8"),
    (EdgeMoEBits, {"low": 4}, "low=4 must be below high=4"),
    (EdgeMoEBits, {"high": 2}, "low=2 must be below high=2"),
])
def test_options_that_make_no_sense_are_refused(component, options, words):
    with pytest.raises(ConfigError, match=words):
        component(**options)


@pytest.mark.parametrize("hidden", [8, 24, 48, 64, 72, 96, 120])
def test_every_width_gives_a_model(hidden):
    model = untrained(ByteMoE(layers=1, experts=2, hidden=hidden, inner=8))
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 257)


# ------------------------------------------------------------------ the small model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a list that grows with every training."""
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    trainings = []
    real = small_moe.train

    def spy(*arguments):
        trainings.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(small_moe, "train", spy)
    return tmp_path, trainings


def untrained(component):
    options = options_of(component)
    return small_moe.untrained(**{k: options[k] for k in options if k not in ("steps", "batch_size", "lr")})


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], v) for k, v in b.items())


def test_it_is_trained_once_and_then_read_bit_for_bit(cache, capsys):
    _, trainings = cache
    first = TINY.build()
    assert "training model=byte_moe once (2 steps" in capsys.readouterr().err
    torch.manual_seed(5)  # the second one must not depend on the generator
    second = TINY.build()
    assert len(trainings) == 1 and same(first, second)
    assert not first.training and not second.training
    assert "training" not in capsys.readouterr().err
    assert not same(first, untrained(TINY))


def test_training_is_a_function_of_the_options(cache, monkeypatch, tmp_path):
    first = TINY.build()
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "another"))
    torch.manual_seed(5)
    assert same(first, TINY.build())
    assert len(cache[1]) == 2


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_damaged_cache_is_named_and_made_again(ending, cache, capsys):
    folder, trainings = cache
    first = TINY.build()
    path = folder / "byte_moe" / f"{small_moe.cache_key(options_of(TINY))}.{ending}"
    path.write_bytes(path.read_bytes()[:-20])
    capsys.readouterr()
    second = TINY.build()
    err = capsys.readouterr().err
    assert "the cached model is damaged and made again" in err and path.name in err
    assert len(trainings) == 2 and same(first, second)
    assert same(first, TINY.build()) and len(trainings) == 2


def test_every_option_is_part_of_the_key():
    other = {"layers": 2, "experts": 3, "top": 1, "hidden": 24, "inner": 24, "length": 24, "steps": 3,
             "batch_size": 3, "lr": 1e-3, "seed": 1}
    from dataclasses import fields, replace

    assert set(other) == {f.name for f in fields(ByteMoE)}
    keys = {small_moe.cache_key(options_of(replace(TINY, **{k: v}))) for k, v in other.items()}
    assert len(keys | {small_moe.cache_key(options_of(TINY))}) == len(other) + 1
