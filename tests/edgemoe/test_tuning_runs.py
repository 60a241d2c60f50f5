"""Runs that tune over a store, and those that tune, convert and serve: alike, resumed, refused in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_models import saved

import poise
from poise.compose import compose
from poise.errors import ConfigError, DataError, FileError, RunError
from poise.files import load_bundle
from poise.runs.checkpoint import Checkpoints
from poise.runs.context import RunContext
from poise.runs.records import load_run
from poise.runs.stages import stage
from poise_edgemoe import Engine, convert
from poise_edgemoe.store.index import EXPERTS
from poise_edgemoe.tuning.components import EdgeMoEStreamed, EdgeMoETuneAndServe

TINY = "{layers: 2, experts: 4, hidden: 32, inner: 32, steps: 2, length: 32, batch_size: 2}"
TRAINED = ("data=sotu", "data.limit=8", "data.chunk=200", "adapter=bone", "adapter.r=4", "train.steps=6",
           "train.batch_size=2", "train.lr=1e-2", "train.eval_every=2", "train.checkpoint_every=2",
           "train.log_every=1", "threads=1")
SIZES = tuple(f"model.{k}={v}" for k, v in (item.split(": ") for item in TINY[1:-1].split(", ")))
FINETUNE = ("recipe=finetune", "recipe.length=32", "recipe.eval_examples=2", *TRAINED)
STREAMED = (*FINETUNE, "model=edgemoe_streamed", f"model.byte_moe={TINY}")
SERVED = ("recipe=edgemoe_tune_and_serve", "recipe.tune.length=32", "recipe.tune.eval_examples=2",
          "recipe.serve.prompts=1", "recipe.serve.prompt_length=8", "recipe.serve.max_new_tokens=4",
          "recipe.serve.length=16", "recipe.serve.windows=4", "recipe.served.context=64", *TRAINED)
WHOLE = (*SERVED, "model=byte_moe", *SIZES)
KILLING = """
import os, signal, sys
from poise.runs import checkpoint
at, save = int(sys.argv[1]), checkpoint.Checkpoints.save

def saved(self, step, *more):
    save(self, step, *more)
    if step == at:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Checkpoints.save = saved
from poise.cli.main import main
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache in which the tiny model is trained and converted once."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.setenv("POISE_CACHE", str(made))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return poise.run([*words, "hydra.run.dir=run"])


def killed_at(step, here, *words):
    """Start a run in a process that kills itself when it has saved a step; return the run."""
    done = subprocess.run([sys.executable, "-c", KILLING, str(step), "run", *words, "hydra.run.dir=run"],
                          cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    return load_run(here / "run")


def stopped_at(step, monkeypatch, *words):
    """Start a run that is interrupted when it has saved a step."""
    save = Checkpoints.save

    def saved_step(self, at, *more):
        save(self, at, *more)
        if at == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", saved_step)
        run(*words)
    assert load_run("run").state == "interrupted"


def rows(directory):
    return [(r["step"], r["name"], r["value"]) for r in load_run(directory).rows]


def adapter(directory):
    return load_bundle(Path(directory) / "adapter" / "adapter")[0]


def same_metrics(a, b):
    mine, theirs = ({k: v for k, v in m.items() if "seconds" not in k and not k.startswith("machine/")}
                    for m in (a, b))
    assert mine == theirs


def test_a_run_over_a_store_is_the_run_in_memory_and_a_killed_one_goes_on(here):
    """The same losses at every step, the same adapter and folded weights; killed and resumed, again."""
    plain = poise.run([*FINETUNE, "model=byte_moe", *SIZES, "hydra.run.dir=plain"])
    one = killed_at(4, here, *STREAMED)
    assert one.state == "killed"
    assert _resume("run") == 0
    ended = load_run("run")
    assert ended.state == "done"
    assert rows("run") == rows("plain")
    own = {"model_bytes"}  # of what is in memory
    same_metrics({k: v for k, v in ended.metrics.items() if k not in own},
                 {k: v for k, v in plain.metrics.items() if k not in own})
    assert ended.metrics["model_bytes"] < plain.metrics["model_bytes"]
    mine, theirs = adapter("run"), adapter("plain")
    assert mine.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in mine.items())
    folded = [Path(name, "folded/model.safetensors").read_bytes() for name in ("run", "plain")]
    assert folded[0] == folded[1]
    assert list(Path("run/checkpoints").glob("step-*.json"))  # the best of them too
    _served_is_what_was_tuned()


def _served_is_what_was_tuned():
    """The adapter of the run, on the model in memory, folded and converted, is what a store serves."""
    model = poise.build("model", "byte_moe", **_options()).build()
    poise.load_adapter(model, "run/adapter").merge()
    model.set_experts_implementation("eager")
    convert(model, "tuned", bits=32)
    convert("run/folded", "folded", bits=32)
    ids = torch.arange(40, 64)[None]
    with torch.no_grad():
        tuned = model(ids).logits
    for store in ("tuned", "folded"):
        with Engine.open(store, context=64) as engine:
            assert torch.equal(engine.logits(ids), tuned)


def _options():
    return {k: int(v) for k, v in (item.split(": ") for item in TINY[1:-1].split(", "))}


def _resume(directory):
    from poise.cli.main import main

    return main(["run", f"resume={directory}"])


def test_a_resume_over_another_store_is_refused(here, capsys, monkeypatch):
    convert(saved(here / "model"), here / "store", bits=32)
    words = [w for w in STREAMED if not w.startswith("model.byte_moe")]
    stopped_at(2, monkeypatch, *words, f"model.store={here / 'store'}")
    other = here / "other"
    convert(saved(here / "model2", seed=1), other, bits=32)
    for path in (here / "store").iterdir():
        path.write_bytes((other / path.name).read_bytes())
    assert _resume("run") == 1
    assert "model.store" in capsys.readouterr().err
    whole = (other / EXPERTS).read_bytes()
    (other / EXPERTS).write_bytes(whole[:-4096])
    with pytest.raises(FileError, match=r"is torn: \d+ bytes instead of"):
        poise.run([*words, f"model.store={other}", "hydra.run.dir=again"])


def test_weights_that_are_no_numbers_are_refused_by_name(here):
    from poise.testing.families import tiny

    model = tiny("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
    model.save_pretrained(here / "model")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.experts\.2\.down.* holds NaN or Inf"):
        EdgeMoEStreamed(path=str(here / "model")).build()


def test_an_encoder_with_a_decoder_is_refused_by_runs(here):
    convert(saved(here / "model", "switch_transformers"), here / "store", bits=32)
    with pytest.raises(ConfigError, match="an encoder with a decoder: runs tune models that"):
        EdgeMoEStreamed(store=str(here / "store")).build()


def test_three_stages_are_one_run_and_what_is_done_is_not_done_again(here, monkeypatch):
    """In 32 bits what is served is what was tuned, bit for bit; stopped in the first stage and the last."""
    stopped_at(4, monkeypatch, *WHOLE, "recipe.bits=32")
    assert load_run("run/tune").state == "interrupted" and not Path("run/tune/adapter").exists()
    assert _resume("run") == 0
    ended = load_run("run")
    metrics = ended.metrics
    assert metrics["loss_served"] == metrics["loss_tuned"] < metrics["loss_before"]
    assert [load_run(f"run/{name}").state for name in ("tune", "serve")] == ["done", "done"]
    assert [r["stage"] for r in ended.notes["stages"]] == ["before tuning", "tuned", "served"]
    assert metrics["in_memory_bytes"] == sum(
        p.nbytes for p in poise.build("model", "byte_moe", **_options()).build().parameters())
    assert metrics["store_bytes"] == sum(f.stat().st_size for f in Path("run/store").iterdir()
                                         if f.name != "index.json")
    before = {p: p.stat().st_mtime_ns for folder in ("tune", "store")
              for p in Path("run", folder).rglob("*") if p.is_file() and p.name != "run.lock"}
    _undo_last_stage()
    assert _resume("run") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    same_metrics(load_run("run").metrics, metrics)


def _undo_last_stage():
    """Leave what a kill in the last stage would have left."""
    for folder in ("run", "run/serve"):
        Path(folder, "summary.json").unlink()
        status = json.loads(Path(folder, "status.json").read_text())
        Path(folder, "status.json").write_text(json.dumps({**status, "state": "interrupted"}))


@pytest.mark.slow
def test_stages_run_over_a_store_too_and_to_the_default_form(here):
    words = (*SERVED, "model=edgemoe_streamed", f"model.byte_moe={TINY}", "recipe.bits=4", "recipe.hot=raw")
    metrics = run(*words).metrics
    plain = poise.run([*WHOLE, "recipe.bits=4", "recipe.hot=raw", "hydra.run.dir=plain"])
    plain = plain.metrics
    assert metrics["in_memory_bytes"] == plain["in_memory_bytes"]
    for name in ("loss_before", "validation_after", "loss_served", "store_bytes"):
        assert metrics[name] == plain[name], name
    assert metrics["loss_tuned"] == pytest.approx(plain["loss_tuned"], rel=1e-5)  # not folded there
    assert metrics["store_bytes"] < metrics["in_memory_bytes"]


def test_a_limit_that_is_too_small_leaves_what_was_tuned(here):
    with pytest.raises(ConfigError, match=r"is too small.*what was tuned is kept, and served.*run/store"):
        run(*WHOLE, "recipe.served.memory=1kB")
    assert Path("run/tune/folded/config.json").is_file() and Path("run/store/index.json").is_file()


@pytest.mark.parametrize(("options", "words"), [
    ({"tune": {"save_folded": False}}, "leaves nothing to convert"),
    ({"tune": {"lenght": 3}}, "has no option 'lenght'"),
    ({"serve": {"prompt": 3}}, "serve has no option 'prompt'"),
    ({"served": {"bits": 4}}, r"served\.bits has no effect"),
    ({"served": {"store": "s"}}, r"served\.store has no effect"),
    ({"served": {"memory": "1MB", "total": "2MB"}}, "memory and total are both given"),
    ({"bits": 32, "scheme": "asym_group"}, "scheme"),
])
def test_what_does_not_fit_is_refused_before_anything_runs(options, words):
    with pytest.raises(ConfigError, match=words):
        EdgeMoETuneAndServe(**options)


@pytest.mark.parametrize(("options", "words"), [
    ({"store": "s", "bits": 4}, "bits=4 has no effect beside store=s"),
    ({"path": "p", "byte_moe": {"layers": 2}}, "byte_moe has no effect"),
    ({"bits": 5}, "bits"), ({"bits": 32, "scheme": "sym_group"}, "scheme"), ({"dtype": "float16"}, "dtype"),
])
def test_options_without_effect_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        EdgeMoEStreamed(**options)


def test_a_quantizer_and_a_recipe_of_its_own_context_are_refused(here):
    with pytest.raises(ConfigError, match=r"quantizer=absmax has no effect.*recipe\.bits"):
        run(*WHOLE, "quantizer=absmax")
    with pytest.raises(RunError, match="holds no run that stages could be part of"):
        stage(RunContext(here / "alone"), "tune", {})


def test_a_stage_of_another_configuration_is_refused(here):
    run(*FINETUNE, "model=byte_moe", *SIZES)
    inner = {"train": {**load_run("run").config["train"], "steps": 2}}
    context = RunContext(here / "run", quiet=True)
    assert stage(context, "again", inner).state == "done"
    with pytest.raises(RunError, match="again holds a run of another configuration"):
        stage(context, "again", {"train": {**inner["train"], "steps": 3}})


@pytest.mark.parametrize("name", ["edgemoe_tune_and_serve", "edgemoe_tune_and_serve_demo"])
def test_the_experiments_compose(name):
    config = compose([f"experiment={name}"]).config
    assert config.recipe["bits"] == 4 and config.adapter["entry"] == "bone"


@pytest.mark.slow
def test_the_short_experiment_lowers_the_loss_and_serves_it(here):
    metrics = run("experiment=edgemoe_tune_and_serve_demo", "threads=1").metrics
    assert metrics["loss_tuned"] < metrics["loss_before"]
    assert abs(metrics["loss_served"] - metrics["loss_tuned"]) < 0.01
    assert metrics["store_bytes"] < 0.3 * metrics["in_memory_bytes"]
