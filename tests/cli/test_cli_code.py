"""A configuration is data: nothing that it names is imported, whoever wrote it."""

from __future__ import annotations

import itertools
import sys

import pytest
from cases import some
from cli_helpers import call

import poise
from poise.errors import ConfigError

TINY = ["train.steps=1", "data.limit=100"]


@pytest.fixture
def trap(here, monkeypatch):
    """A module that leaves a file behind when it is imported, and a folder for YAML files beside it."""
    (here / "code").mkdir()
    (here / "code" / "trapdoor.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('SPRUNG').touch()\n"
        "class Callback:\n    def on_job_start(self, **_): pass\n"
        "level = 'INFO'\n")
    monkeypatch.syspath_prepend(str(here / "code"))
    (here / "yaml" / "experiment").mkdir(parents=True)
    yield here
    assert not (here / "code" / "SPRUNG").exists(), "code that a configuration named was imported"
    sys.modules.pop("trapdoor", None)


@pytest.mark.parametrize("typed", [
    ["+hydra.callbacks.x._target_=trapdoor.Callback"],
    ["+hydra.callbacks.x={_target_:trapdoor.Callback}"],
    ["++hydra.callbacks={x:{_target_:trapdoor.Callback}}"],
    ["hydra.launcher._target_=trapdoor.Callback"], ["hydra.sweeper._target_=trapdoor.Callback"],
    ["+model._target_=trapdoor.Callback"], ["+x._target_=trapdoor.Callback"],
    ["hydra.searchpath=[pkg://trapdoor]"], ["hydra.searchpath=[file:///tmp,pkg://trapdoor.conf]"],
    ["hydra.searchpath=[structured://trapdoor]"], ["hydra.searchpath=[PKG://trapdoor]"],
    ["hydra.launcher._target_=hydra._internal.core_plugins.basic_launcher.os.system"],
    ["+hydra.job_logging.handlers.x.class=trapdoor.Callback"],
    ["+hydra.job_logging.formatters.x={'()':trapdoor.Callback}"],
], ids=lambda t: t[0].split("=")[0])
@pytest.mark.parametrize("sweep", some([[], ["--multirun", "seed=0,1"]], keep=[[]]), ids=["run", "sweep"])
def test_code_that_is_typed_is_refused(capsys, trap, typed, sweep):
    refused = call(capsys, "run", *sweep, *TINY, *typed)
    assert refused.code == 2 and refused.complaint
    assert not (trap / "runs").exists()


YAML = {
    "callback": "hydra: {callbacks: {x: {_target_: trapdoor.Callback}}}",
    "launcher": "hydra: {launcher: {_target_: trapdoor.Callback}}",
    "sweeper": "hydra: {sweeper: {_target_: trapdoor.Callback}}",
    "a stream": "hydra: {job_logging: {handlers: {x: {class: logging.StreamHandler, "
                "stream: 'ext://trapdoor.level'}}}}",
    "a queue": "hydra: {job_logging: {handlers: {x: {class: logging.handlers.QueueHandler, "
               "queue: trapdoor.Callback}}}}",
    "a level": "hydra: {hydra_logging: {root: {level: 'ext://trapdoor.level'}}}",
    "a file": "hydra: {job_logging: {handlers: {x: {class: logging.FileHandler, filename: code/SPRUNG}}}}",
    "a sweeper's launcher": "hydra: {launcher: {_target_: "
                            "hydra._internal.core_plugins.basic_sweeper.BasicSweeper}}",
    "handler": "hydra: {job_logging: {version: 1, handlers: {x: {class: trapdoor.Callback}}}}",
}


SWEEPS = {"run": [], "sweep": ["--multirun", "seed=0,1"], "sweep over experiments": ["--multirun"]}


@pytest.mark.parametrize(("how", "name"), some(
    itertools.product(SWEEPS, YAML),
    keep=[*(("run", name) for name in YAML), ("sweep", "launcher"),
          ("sweep over experiments", "callback")]))
def test_an_experiment_from_a_stranger_runs_no_code(capsys, trap, name, how):
    sweep = SWEEPS[how]
    (trap / "yaml" / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{YAML[name]}\n")
    chosen = "experiment=none,theirs" if sweep == ["--multirun"] else "experiment=theirs"
    refused = call(capsys, "run", *sweep, *TINY, chosen, f"hydra.searchpath=[file://{trap / 'yaml'}]")
    assert refused.code == 2 and refused.complaint
    assert not (trap / "runs").exists()


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "all"], ["--info", "all"]], ids=" ".join)
def test_what_only_shows_a_configuration_runs_no_code_of_it(capsys, trap, flags):
    (trap / "yaml" / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{YAML['a level']}\n")
    refused = call(capsys, "run", *flags, "experiment=theirs", f"hydra.searchpath=[file://{trap / 'yaml'}]")
    assert refused.code == 2 and "hydra.hydra_logging" in refused.complaint


@pytest.mark.parametrize("choice", ["none", "disabled"])
def test_logging_can_be_silent_in_either_way_of_hydra(capsys, here, choice):
    typed = [f"hydra/job_logging={choice}", f"hydra/hydra_logging={choice}"]
    assert call(capsys, "run", "--multirun", "seed=0", *TINY, *typed).code == 0


@pytest.mark.parametrize("typed, said", [
    (["hydra.sweep.subdir=same"], "hydra.sweep.subdir=same: each job needs a folder of its own"),
    (["hydra.sweep.subdir=../${hydra.job.num}"], "hydra.sweep.subdir=../0: each job needs"),
    (["hydra.sweep.subdir=/tmp/x${hydra.job.num}"], "below hydra.sweep.dir"),
    (["hydra.sweep.subdir=."], "below hydra.sweep.dir"),
    (["hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0: allowed is 1 or more"),
    (["launcher=joblib", "hydra.launcher.pre_dispatch=quit"], "pre_dispatch=quit: allowed is"),
    (["experiment={}"], "experiment takes the name of one choice"),
    (["launcher={a:1}"], "launcher takes the name of one choice"),
], ids=lambda t: t[0] if isinstance(t, list) else "")
def test_a_sweep_that_cannot_end_well_is_refused_before_it_begins(capsys, here, typed, said):
    refused = call(capsys, "run", "--multirun", "seed=0,1", *TINY, *typed)
    assert refused.code == 2 and said in refused.complaint
    assert not list(here.rglob("resolved.yaml"))


def test_folders_and_registered_packages_stay_on_the_search_path(capsys, trap):
    (trap / "yaml" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    path = f"hydra.searchpath=[file://{trap / 'yaml'}]"
    assert call(capsys, "run", *TINY, "experiment=mine", path).code == 0
    (run,) = (trap / "runs").rglob("resolved.yaml")
    assert poise.load_run(run.parent).config["seed"] == 7


def test_a_refused_job_is_found_before_the_first_one_runs(capsys, here):
    refused = call(capsys, "run", "--multirun", "adapter=none,bone", *TINY)
    assert refused.code == 2
    assert "job 2 of 2 (adapter=bone" in refused.complaint and "freezes its base" in refused.complaint
    assert not (here / "runs").exists()
    with pytest.raises(ConfigError, match=r"job 2 of 2"):
        poise.run(["hydra.mode=MULTIRUN", "adapter=none,bone", *TINY])


def test_jobs_are_counted(capsys, here):
    done = call(capsys, "run", "--multirun", "seed=0,1", *TINY)
    assert done.code == 0 and "[1/2] seed=0" in done.err and "[2/2] seed=1" in done.err
