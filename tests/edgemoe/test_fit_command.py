"""`poise moe fit`: from a store or recordings to a predictor, and back into an engine."""

from __future__ import annotations

import pytest
import torch
from moe_models import saved
from test_moe_flags import limit

from poise.cli.main import main
from poise_edgemoe import convert, predictors
from poise_edgemoe.cache.traces import read_trace, tokens_of, write_trace
from poise_edgemoe.components import EdgeMoEStore
from poise_edgemoe.engine import Engine
from poise_edgemoe.recording import Listening, recorded


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return convert(saved(folder / "model", "qwen3_moe"), folder / "store", bits=32)


@pytest.fixture
def moe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main(["moe", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_from_a_store_to_an_engine_that_asks(store, moe, tmp_path):
    few = ("--prompts", 2, "--max-new-tokens", 20)
    code, out, err = moe("fit", store, "--out", "p.json", *few)
    assert code == 0 and "2 layers of 4 experts" in out and "1 layer ahead" in out, err
    assert moe("fit", store, "--out", "q", *few)[0] == 0
    for kind in ("json", "safetensors"):
        assert (tmp_path / f"p.{kind}").read_bytes() == (tmp_path / f"q.{kind}").read_bytes()
    with Engine.open(store, context=64) as engine:
        want = engine.generate("On ", 9)
    least = int(limit(store, 3)[:-1]) + predictors.load("p").nbytes
    under = ("--memory", f"{least}B", "--context", 64)
    given = ("generate", store, "--prompt", "On ", "--max-new-tokens", 9, "--predictor", "p.json", *under)
    for more in ((), ("--policy", "predicted"), ("--policy", "predicted", "--prefetch", "none")):
        code, out, err = moe(*given, *more)
        assert (code, out) == (0, want + "\n"), err
    served = EdgeMoEStore(store=str(store), predictor="p.json", policy="predicted", memory=under[1],
                          context=64)
    assert served.inputs()["predictor"].path.name == "p.json"
    with served.build() as engine:
        assert engine.generate("On ", 9) == want and engine.cache.policy.name == "predicted"
        assert isinstance(engine.ahead.source, predictors.FromRouting)


def test_from_recordings_to_a_simulation(store, moe, tmp_path):
    with Engine.open(store, prefetch=Listening(), context=64) as engine:
        for n in range(2):
            seen = recorded(engine, torch.tensor([[5, 6, 7]]), 20, seed=n)
            write_trace(tmp_path / f"{n}.route.csv.gz", seen)
    again = read_trace("1.route.csv.gz")
    tokens = tokens_of(again.decode, again.layers)
    assert len(again.looked) == len(tokens) == 19 and again.model == engine.routers
    assert all(not token[0] and len(token[1]) == len(used[1]) for token, used in zip(again.looked, tokens))
    code, out, _ = moe("fit", "0.route.csv.gz", "--more", "1.route.csv.gz", "--method", "combined", "--out",
                       "p")
    assert code == 0 and "combined (2 of 2)" in out
    code, out, _ = moe("bench", "1.route.csv.gz", "--simulate", "--predictor", "p.json")
    assert code == 0 and "\npredicted " in out


@pytest.mark.parametrize(("words", "told"), [
    (("fit", "STORE"), "moe fit needs --out"),
    (("fit", "STORE", "--out", "gone/p.json"), "there is no folder"),
    (("fit", "t.route.csv.gz", "--out", "p", "--seed", "1"), "--seed has no effect on a recording"),
    (("fit", "t.route.csv.gz", "--out", "p"), "t.route.csv.gz cannot be read"),
    (("fit", "STORE", "--out", "p", "--max-new-tokens", "4096"), "leaves no room for a prompt"),
    (("fit", "STORE", "--out", "p", "--max-new-tokens", "9", "--data", "gone.txt"), "gone.txt"),
    (("fit", "STORE", "--out", "p", "--method", "tables"), "method"),
])
def test_a_wrong_word_is_one_line_of_a_fit(words, told, store, moe):
    code, out, err = moe(*(store if word == "STORE" else word for word in words))
    assert code and not out and told in err and "Traceback" not in err
