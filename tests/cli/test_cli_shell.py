"""`poise run` as a person types it: the default, what it shows, sweeps, and the same as a library."""

from __future__ import annotations

import shutil

import pytest
import yaml
from cases import slowly
from cli_helpers import TINY, call, contents, cut_back, observed, python, shell

import poise
from poise.registry import Registry
from poise.runs.records import find_runs, load_config, load_run


def entries_of(config: dict) -> dict[str, str]:
    return {k: v["entry"] for k, v in config.items() if isinstance(v, dict) and "entry" in v}


def test_a_run_without_a_word_trains_a_small_network_on_digits(here):
    done = shell("run", cwd=here).is_done()
    (directory,) = find_runs([here])
    one = load_run(directory)
    assert entries_of(one.config) == {
        "recipe": "classify", "model": "mlp", "data": "digits", "adapter": "none",
        "quantizer": "none", "aggregator": "none", "tracker": "none",
    }
    assert one.config["threads"] == 1  # of OMP_NUM_THREADS, which `shell` sets
    assert one.config["seed"] == 0 and one.state == "done"
    assert one.metrics["test_accuracy"] > 0.9
    assert one.notes["data"] and one.environment["versions"]["torch"]
    assert "test_accuracy" in done.out and f"records: {directory.relative_to(here)}" in done.out


def test_the_configuration_is_shown_and_nothing_is_run(here):
    shown = yaml.safe_load(shell("run", "--cfg", "job", "seed=3", cwd=here).is_done().out)
    assert entries_of(shown)["model"] == "mlp" and shown["seed"] == 3
    assert list(here.iterdir()) == []


def test_one_package_of_the_configuration_is_shown(capsys, here):
    shown = yaml.safe_load(call(capsys, "run", "--cfg", "job", "-p", "model").is_done().out)
    assert shown["entry"] == "mlp" and shown["hidden"] == [128, 128]


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--info", "defaults"], "quantizer"),
        *map(slowly, (
            (["--info", "searchpath"], "poise"),
            (["--info", "plugins"], "PoiseSearchPath"),
            (["--cfg", "job", "--resolve"], "threads"),
            (["--cfg", "hydra"], "sweep"),
        )),
        (["--help"], "poise run experiment="),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_hydra_can_tell_is_told(here, argv, word):
    done = shell("run", *argv, cwd=here).is_done()
    assert word in done.out and "Traceback" not in done.err
    assert list(here.iterdir()) == []


def test_help_names_every_command(capsys):
    text = call(capsys, "--help").is_done().out
    for command in ("run", "list", "describe", "report", "compare", "demo", "doctor", "data"):
        assert f"  {command} " in text
    assert call(capsys).out == text
    assert call(capsys, "--version").is_done().out.startswith("poise ")


def test_records_go_where_they_are_sent(capsys, here, tmp_path, monkeypatch):
    call(capsys, "run", *TINY, f"paths.out={tmp_path}/elsewhere").is_done()
    monkeypatch.setenv("POISE_OUT", str(tmp_path / "by-environment"))
    call(capsys, "run", *TINY).is_done()
    assert len(find_runs([tmp_path / "elsewhere"])) == len(find_runs([tmp_path / "by-environment"])) == 1
    assert list(here.iterdir()) == []


def test_the_directory_may_have_odd_characters(capsys, here, tmp_path):
    odd = tmp_path / "a b, c=d's"
    odd.mkdir()
    quoted = '"' + str(odd) + '"'
    call(capsys, "run", *TINY, f"paths.out={quoted}").is_done()
    call(capsys, "run", "-m", *TINY, "seed=0,1", f"paths.out={quoted}").is_done()
    assert len(find_runs([odd])) == 3


# ------------------------------------------------------------------ sweeps


@pytest.mark.parametrize("how", [[], ["launcher=joblib", "threads=1"]], ids=["serial", "joblib"])
def test_a_sweep_equals_its_runs(capsys, here, how):
    done = call(capsys, "run", "-m", *TINY, *how, "seed=0,1").is_done()
    first, second = find_runs([here])
    assert (first.name, second.name) == ("0", "1")
    for seed, directory in enumerate((first, second)):
        alone = here / f"alone-{seed}"
        poise.run([*TINY, f"seed={seed}", f"hydra.run.dir={alone}"])
        assert load_config(directory)["seed"] == seed
        assert observed(directory) == observed(alone)
        assert (directory / "final.safetensors").read_bytes() == (alone / "final.safetensors").read_bytes()
    assert f"records: {first.parent.relative_to(here)}" in done.out


def test_a_job_that_fails_stops_no_other(capsys, here):
    done = call(capsys, "run", "-m", *TINY, "train.lr=1e30,1e-3", "train.optimizer=sgd")
    states = [load_run(d).state for d in find_runs([here])]
    assert states == ["failed", "done"]
    assert done.code != 0 and "Traceback" not in done.err and "the loss is" in done.err


def test_a_job_that_is_refused_refuses_the_sweep(capsys, here):
    short = [t for t in TINY if "hidden" not in t]
    refused = call(capsys, "run", "-m", *short, "model=mlp,smollm2")
    assert refused.code == 2 and "job 2 of 2" in refused.complaint
    assert "model=smollm2 is for causal_lm" in refused.complaint
    assert not list(here.rglob("resolved.yaml"))


# ------------------------------------------------------------------ built once


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The kinds of the components that are built from a configuration, in their order."""
    kinds: list[str] = []
    build_from = Registry.build_from

    def counted(self, kind, config):
        kinds.append(kind)
        return build_from(self, kind, config)

    monkeypatch.setattr(Registry, "build_from", counted)
    return kinds


@pytest.mark.parametrize("argv, runs", [([], 1), (["-m", "seed=0,1"], 2)], ids=["one run", "a sweep"])
def test_the_parts_of_a_run_are_built_once(capsys, here, built, argv, runs):
    call(capsys, "run", *TINY, *argv).is_done()
    assert built == ["recipe", "data", "model"] * runs


def test_the_parts_of_a_resumed_run_are_built_once(capsys, here, finished, built):
    shutil.copytree(finished / "a", here / "a")
    cut_back(here / "a", 3)
    call(capsys, "run", "resume=a").is_done()
    assert built == ["recipe", "data", "model"]


def test_a_resume_that_is_refused_is_not_announced(capsys, here, finished):
    shutil.copytree(finished / "a", here / "a")
    cut_back(here / "a", 3)
    before = contents(here / "a")
    refused = call(capsys, "run", "resume=a", "tracker=nope").refuses(2, "'nope'", "tensorboard")
    assert refused.err.splitlines() == [refused.complaint]
    assert contents(here / "a") == before


# ------------------------------------------------------------------ as a library


def test_run_returns_a_run_and_a_sweep_a_list(here):
    one = poise.run([*TINY])
    assert one.state == "done" and one.metrics["test_loss"] > 0
    again = poise.load_run(one.directory)
    assert again.metrics == one.metrics and again.series("loss")[0] == [2, 4, 6]
    several = poise.run([*TINY, "hydra.mode=MULTIRUN", "seed=0,1"])
    assert [r.config["seed"] for r in several] == [0, 1]


def test_a_library_call_raises_what_the_command_line_prints(here):
    with pytest.raises(poise.errors.ConfigError, match="did you mean 'mlp'"):
        poise.run(["model=mlpp"])
    with pytest.raises(poise.errors.FileError, match="no run"):
        poise.load_run(here)
    with pytest.raises(poise.errors.RunError, match="the loss is"):
        poise.run([*TINY, "train.lr=1e30", "train.optimizer=sgd"])


def test_a_library_run_is_quiet_and_leaves_the_process_as_it_was(here):
    code = (
        "import os, sys, poise\n"
        "before = dict(os.environ), list(sys.argv), sys.excepthook, os.getcwd()\n"
        "poise.run(sys.argv[1:] + ['hydra.mode=MULTIRUN', 'seed=0,1'])\n"
        "poise.run(sys.argv[1:])\n"
        "assert before == (dict(os.environ), list(sys.argv), sys.excepthook, os.getcwd())\n"
    )
    done = python(code, *TINY, cwd=here).is_done()
    assert (done.out, done.err) == ("", "")


def test_the_same_run_twice_in_one_process_is_the_same(here):
    one, two = poise.run([*TINY]), poise.run([*TINY])
    assert one.directory != two.directory
    assert observed(one.directory) == observed(two.directory)


# ------------------------------------------------------------------ small commands


def test_list_and_describe_say_what_is_installed(capsys):
    everything = call(capsys, "list").is_done().out
    for entry in poise.entries():
        assert entry.name in everything
        assert entry.name in call(capsys, "list", entry.kind).is_done().out
        assert entry.summary in call(capsys, "describe", entry.kind, entry.name).is_done().out


def test_describe_tells_default_range_and_unit(capsys):
    text = call(capsys, "describe", "model", "mlp").is_done().out
    assert "dropout: float = 0.0" in text and ">= 0 and < 1" in text
    assert "relu, gelu, silu, tanh" in text


def test_doctor_and_data_tell_about_this_machine(capsys, here):
    text = call(capsys, "doctor").is_done().out
    for what in ("python", "torch", "memory", "disk", "O_DIRECT", "extra plots"):
        assert what in text
    inventory = call(capsys, "data").is_done().out
    assert "tabular/airfoil" in inventory and "licence" in inventory
    assert "ALTERED" not in call(capsys, "data", "--check").is_done().out
