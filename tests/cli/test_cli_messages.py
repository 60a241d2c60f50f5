"""Every wrong word on the command line: one line, the key, the value, what is allowed, exit code 2."""

from __future__ import annotations

import itertools
import os

import pytest
from cases import some
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
    "unknown key of Hydra, added": ("+hydra.x=1", "hydra.x=1", "hydra has no key 'x'", "searchpath"),
    "unknown key below Hydra's, added": ("++hydra.run.dirr=x", "hydra.run.dirr=x", "did you mean 'dir'"),
    "unknown path, added": ("+paths.oot=x", "paths.oot=x", "did you mean 'out'"),
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
    "a word among numbers": ("model.hidden=[8,a]", "model.hidden=[8,a]", "'a'", "Integer"),
    "a word among numbers of a whole": ("train={milestones:[b]}", "train={milestones:[b]}", "'b'", "Float"),
    "milestones that do not increase": ("train.milestones=[0.5,0.2]", "milestones=[0.5, 0.2]", "increase"),
    "null for a group": ("adapter=null", "adapter=null", "write adapter=none"),
    "null for training": ("train=null", "train=null", "write train=default"),
    "null for a launcher": ("launcher=null", "launcher=null", "write launcher=basic"),
    "null for an experiment": ("experiment=null", "write experiment=none"),
    "two equal signs": ("tag=a=b", "tag=a=b", "'tag=\"a=b\"'"),
    "missing environment": ("tag=${oc.env:NOT_SET_ANYWHERE}", "tag", "NOT_SET_ANYWHERE", "export"),
    "missing key in an interpolation": ("tag=${nowhere}", "tag", "nowhere"),
    "several values": ("seed=1,2", "seed=1,2", "--multirun", "'seed=[1,2]'"),
    "a range of values": ("seed=range(3)", "seed=range(3)", "--multirun"),
    "another version": ("version=99", "version=99", "version 2"),
    "no override": ("seed", "'seed'", "KEY=VALUE"),
    "a group that is taken away": ("~model", "model"),
    "a number for a group": ("adapter=1", "adapter=1", "name of one choice", "poise list adapter"),
    "no number for a group": ("model=nan", "model=nan", "name of one choice"),
    "a truth for a group": ("data=true", "data=true", "name of one choice"),
    "a number for an experiment": ("experiment=1", "experiment=1", "name of one choice"),
    "a number for a launcher": ("launcher=1", "launcher=1", "name of one choice"),
    "two experiments": ("experiment=[a,b]", "experiment=[a,b]", "name of one choice"),
    "no key": ("+=a", "+=a"),
    "a number for what is taken away": ("~data=1", "~data=1"),
    "a number for a folder of settings": ("paths=1", "paths=1", "must be a string"),
    "a number for Hydra": ("hydra=1", "hydra=1"),
    "a list for training": ("train=[1]", "train=[1]"),
    "an option of no adapter": ("+adapter.r=64", "adapter.r=64", "adapter=none has no options"),
    "an option of no quantizer": ("+quantizer.bits=4", "quantizer.bits=4", "quantizer=none has no options"),
    "a folder that is not there": ("hydra.searchpath=[nope]", "hydra.searchpath", "nope"),
    "an empty folder of a run": ("hydra.run.dir=", "hydra.run.dir is empty"),
    "a launcher that is none": ("hydra.launcher=1", "hydra.launcher=1"),
    "a variable of the environment": ("+hydra.job.env_set.LD_PRELOAD=x", "LD_PRELOAD", "in the shell"),
    "loggers that are none": ("hydra.verbose=3", "hydra.verbose=3"),
    "a value nested too deeply": ("tag=" + "[" * 500 + "]" * 500, "tag=[[", "nested too deeply"),
    "a tag that is a path": ("tag=a/b", "tag='a/b'", "one folder"),
    "a tag that leads out": ("tag=..", "tag='..'", "one folder"),
    "a tag longer than a folder's name": ("tag=" + "x" * 300, "tag=xxx", "200 bytes"),
    "unknown flag": ("--frobnicate", "'--frobnicate'", "--multirun", "--cfg"),
}


@pytest.mark.parametrize("typed, words", [(v[0], v[1:]) for v in WRONG.values()], ids=list(WRONG))
def test_a_wrong_word_is_refused_in_one_line(capsys, here, typed, words):
    refused = call(capsys, "run", typed).refuses(2, *words)
    assert refused.out == ""
    assert list(here.iterdir()) == [], "a refused run leaves nothing behind"


HEAD = "# @package _global_\n"
FILES = {  # an experiment's text, and what the line about it must hold
    "tab": ("train:\n\tlr: 1\n", "line 3", "cannot start any token"),
    "a key twice": ("seed: 1\nseed: 2\n", "line 3", "duplicate key seed"),
    "undefined alias": ("tag: *nope\n", "line 2", "undefined alias 'nope'"),
    "empty defaults": ("defaults:\nseed: 1\n", "experiment=odd", "defaults must be a list"),
    "a word for defaults": ("defaults: none\n", "experiment=odd", "defaults must be a list"),
    "a number in defaults": ("defaults: [1]\n", "experiment=odd", "defaults"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "line 3", "single document"),
    "itself": ("defaults:\n  - odd\n", "experiment=odd", "leads back to itself"),
    "hydra is null": ("hydra: null\n", "line 2", "hydra is a mapping"),
    "a list": ("- 1\n", "holds no mapping"),
    "a number": ("7\n", "holds no mapping"),
    "a control character": ("tag: a\x00b\n", "special characters"),
    "a foreign object": ("tag: !!python/object:os.system {}\n", "line 2", "constructor"),
    "deep nesting": ("tag: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deeply"),
    "many levels": ("".join(f"{' ' * i}a{i}:\n" for i in range(60)), "line 42", "nested too deeply"),
    "an alias within itself": ("tag: &a [*a, *a]\n", "line 2", "within itself"),
    "aliases that multiply": ("a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)), "aliases stand for"),
    "an interpolation of itself": ("tag: ${tag}\n", "interpolation"),
    "a word among numbers": ("model:\n  hidden: [a]\n", "model.hidden[0]", "'a'", "Integer"),
    "too long": ("#" * (1 << 20) + "\n", "bytes"),
}


@pytest.mark.parametrize(("how", "name"), some(
    itertools.product(["run", "sweep", "shown"], FILES),
    keep=[*(("run", name) for name in FILES), ("sweep", "tab"), ("sweep", "a list"), ("shown", "itself"),
          ("shown", "an interpolation of itself")]))
def test_a_file_that_is_no_configuration_is_refused_in_one_line(capsys, here, name, how):
    text, *words = FILES[name]
    (here / "yaml" / "experiment").mkdir(parents=True)
    (here / "yaml" / "experiment" / "odd.yaml").write_text(HEAD + text)
    flags = {"run": [], "sweep": ["--multirun", "seed=0,1"], "shown": ["--cfg", "job"]}[how]
    found = call(capsys, "run", *flags, "experiment=odd", f"hydra.searchpath=[file://{here / 'yaml'}]")
    if how == "shown" and "interpolation" in words:  # shown as it is written
        return found.is_done() and None
    found.refuses(2, *words)
    assert not (here / "runs").exists()


@pytest.mark.parametrize("data", [b"tag: \xe9\xff\n", "tag: x\n".encode("utf-16")])
def test_a_file_that_is_not_utf8_is_named(capsys, here, data):
    (here / "yaml" / "experiment").mkdir(parents=True)
    (here / "yaml" / "experiment" / "odd.yaml").write_bytes(HEAD.encode() + data)
    call(capsys, "run", "experiment=odd", f"hydra.searchpath=[file://{here / 'yaml'}]").refuses(
        2, "odd.yaml", "not UTF-8")


def test_a_file_may_begin_with_a_byte_order_mark(capsys, here):
    """As Windows' editors write it: the key was '\\ufeffsteps', and a header in the first line not seen."""
    for name, text in (("experiment", HEAD + "seed: 7\n"), ("train", "steps: 71\n")):
        (here / "yaml" / name).mkdir(parents=True)
        (here / "yaml" / name / "mine.yaml").write_text("\ufeff" + text)
    where = f"hydra.searchpath=[file://{here / 'yaml'}]"
    shown = call(capsys, "run", "--cfg", "job", "experiment=mine", "train=mine", where).out
    assert "\nseed: 7\n" in shown and "\n  steps: 71\n" in shown


def test_a_pipe_in_the_place_of_a_file_is_refused(capsys, here):
    (here / "yaml" / "experiment").mkdir(parents=True)
    os.mkfifo(here / "yaml" / "experiment" / "odd.yaml")
    call(capsys, "run", "experiment=odd", f"hydra.searchpath=[file://{here / 'yaml'}]").refuses(
        2, "odd.yaml", "no regular file")


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
