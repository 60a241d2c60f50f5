"""Every wrong word on the command line: one line, the key, the value, what is allowed, exit code 2."""

from __future__ import annotations

import pytest
from cli_helpers import TINY, call, python

# what was typed, and what the line about it must hold
WRONG = {
    "unknown entry": ("model=mlpp", "model=mlpp", "did you mean 'mlp'", "resnet20"),
    "unknown entry of an empty name": ("model=", "model=", "mlp"),
    "unknown option": ("model.hiden=3", "model.hiden=3", "model=mlp", "did you mean 'hidden'"),
    "unknown option, added": ("+model.hiden=3", "model=mlp", "hiden", "did you mean 'hidden'"),
    "unknown training option": ("train.stepz=3", "train.stepz=3", "did you mean 'steps'"),
    "unknown training option, added": ("+train.stepz=3", "stepz", "did you mean 'steps'"),
    "unknown group": ("modle=mlp", "modle=mlp", "did you mean 'model'"),
    "unknown key": ("sead=1", "sead=1", "did you mean 'seed'"),
    "unknown key, added": ("+unknown=1", "unknown=1", "recipe", "seed"),
    "unknown path": ("paths.oot=x", "paths.oot=x", "out"),
    "unknown key of Hydra": ("hydra.run.dirr=x", "hydra.run.dirr=x", "dir"),
    "unknown experiment": ("experiment=compander_digit", "did you mean 'compander_digits'"),
    "unknown training preset": ("train=nope", "train=nope", "default, quick"),
    "unknown launcher": ("launcher=nope", "launcher=nope", "basic, joblib"),
    "unknown tracker": ("tracker=nope", "tracker=nope", "mlflow, none, tensorboard, wandb"),
    "unknown entry below a key": ("model.entry=nope", "nope", "mlp"),
    "task mismatch": ("model=smollm2", "model=smollm2", "causal_lm", "recipe=classify", "mlp", "resnet20"),
    "untrained base": ("adapter=bone", "adapter=bone", "model=mlp", "untrained"),
    "frozen weights": ("quantizer=absmax", "quantizer=absmax", "adapter=bone", "train.steps=0"),
    "a recipe without data": ("data=none", "data=none", "poise list data"),
    "no recipe": ("recipe=none", "recipe=none", "poise list recipe"),
    "out of range": ("train.lr=-1", "rain.lr=-1", ">= 0"),
    "out of range in a part": ("model.dropout=1", "ropout=1", ">= 0 and < 1"),
    "out of range, exclusive": ("train.clip=0", "rain.clip=0", "> 0"),
    "not a choice": ("train.optimizer=adamm", "'adamm'", "sgd, adam, adamw"),
    "seed out of range": ("seed=-1", "seed=-1", "0 <= seed"),
    "threads out of range": ("threads=0", "threads=0", "1 to 1024"),
    "wrong type": ("train.steps=x", "train.steps=x", "Integer"),
    "wrong type, a fraction": ("seed=1.5", "seed=1.5", "Integer"),
    "wrong type, a number for a list": ("model.hidden=5", "model.hidden=5", "list"),
    "null for a group": ("adapter=null", "adapter=null", "write adapter=none"),
    "null for an experiment": ("experiment=null", "write experiment=none"),
    "two equal signs": ("tag=a=b", "tag=a=b", "'tag=\"a=b\"'"),
    "missing environment": ("tag=${oc.env:NOT_SET_ANYWHERE}", "tag", "NOT_SET_ANYWHERE", "export"),
    "missing key in an interpolation": ("tag=${nowhere}", "tag", "nowhere"),
    "several values": ("seed=1,2", "seed=1,2", "--multirun", "'seed=[1,2]'"),
    "a range of values": ("seed=range(3)", "seed=range(3)", "--multirun"),
    "another version": ("version=99", "version=99", "version 2"),
    "no override": ("seed", "'seed'", "KEY=VALUE"),
    "a group that is taken away": ("~model", "model"),
    "unknown flag": ("--frobnicate", "'--frobnicate'", "--multirun", "--cfg"),
}


@pytest.mark.parametrize("typed, words", [(v[0], v[1:]) for v in WRONG.values()], ids=list(WRONG))
def test_a_wrong_word_is_refused_in_one_line(capsys, here, typed, words):
    refused = call(capsys, "run", typed).refuses(2, *words)
    assert refused.out == ""
    assert list(here.iterdir()) == [], "a refused run leaves nothing behind"


def test_an_empty_folder_for_records_does_not_mean_the_root(capsys, here):
    call(capsys, "run", *TINY, "paths.out=").refuses(2, "paths.out", "paths.out=DIR")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(capsys, here, device):
    call(capsys, "run", *TINY, f"device={device}").refuses(2, f"device={device}", "device=cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_a_directory_is_made(capsys, here, device):
    call(capsys, "run", *TINY, f"device={device}")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "argv, words",
    [
        (["rum"], ["'rum'", "did you mean 'run'", "doctor"]),
        (["describe", "adaptor", "bone"], ["'adaptor'", "did you mean 'adapter'", "quantizer"]),
        (["describe", "adapter", "bonne"], ["'bonne'", "did you mean 'bone'", "compander"]),
        (["describe", "adapter"], ["poise describe KIND NAME"]),
        (["list", "models"], ["'models'", "did you mean 'model'"]),
        (["list", "model", "adapter"], ["poise list [KIND]"]),
        (["report"], ["poise report DIR"]),
        (["report", ".", "--format", "pdf"], ["pdf", "terminal, markdown, csv, html"]),
        (["report", ".", "--format"], ["--format needs a value"]),
        (["report", ".", "--colour"], ["--colour", "--metric"]),
        (["compare", "."], ["poise compare A B"]),
        (["doctor", "nowhere"], ["nowhere"]),
        (["data", "--chek"], ["poise data [--check]"]),
        (["demo", "--fast"], ["poise demo"]),
        (["run", "--cfg", "job", "model=mlpp"], ["model=mlpp", "did you mean 'mlp'"]),
        (["run", "--cfg", "job", "train.stepz=3"], ["train.stepz=3", "did you mean 'steps'"]),
        (["run", "--cfg", "job", "seed=x"], ["seed=x", "Integer"]),
        (["run", "--cfg", "jobs"], ["jobs", "job"]),
        (["run", "--info", "nothing"], ["nothing", "searchpath"]),
        (["run", "--multirun", "seed=0,1", "model=mlpp"], ["model=mlpp", "did you mean 'mlp'"]),
        (["run", "--multirun", "seed=0,1", "train.stepz=3"], ["train.stepz=3", "steps"]),
    ],
    ids=" ".join,
)
def test_other_wrong_usage_is_refused_in_one_line(capsys, here, argv, words):
    try:
        refused = call(capsys, *argv)
    except SystemExit as left:
        pytest.fail(f"poise.cli.main.main left by SystemExit({left.code})")
    refused.refuses(2, *words)
    assert list(here.iterdir()) == []


def test_a_value_quoted_twice_may_hold_an_equal_sign(capsys, here):
    call(capsys, "run", *TINY, 'tag="a=b"').is_done()
    assert [p.name for p in (here / "runs").iterdir()] == ["a=b"]


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "model=smollm2"],
        ["run", "recipe=finetune", "model=mlp"],
        ["run", "train.lr=-1"],
        ["run", "adapter=bone"],
        ["run", "data=none"],
        ["run", "--cfg", "job"],
        ["list"],
        ["describe", "adapter", "bone"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_refusals_and_help_load_nothing_heavy(tmp_path, argv):
    code = (
        "import sys\nfrom poise.cli.main import main\nmain(sys.argv[1:])\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    done = python(code, *argv, cwd=tmp_path).is_done()
    assert done.out.splitlines()[-1] == "HEAVY []"
