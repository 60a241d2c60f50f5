"""Configurations of any kind: composed to what was asked for, or refused in one line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fuzzing import Verdicts, cases, mutated, sizes

from poise.compose import experiments
from poise.compose.composing import compose

CONF = Path(__file__).parents[2] / "conf" / "experiment"
KEYS = [
    "seed", "threads", "device", "tag", "version", "train.lr", "train.steps", "train.clip",
    "train.milestones", "train.optimizer", "model", "model.hidden", "model.dropout", "model.entry",
    "adapter", "adapter.r", "data", "data.limit", "data.path", "recipe", "recipe.normalise", "quantizer",
    "quantizer.bits", "aggregator", "tracker", "launcher", "experiment", "paths.out", "hydra.run.dir",
    "hydra.mode", "hydra.searchpath", "hydra.verbose", "hydra.launcher", "hydra", "train", "nope",
    "model.nope", "", ".", "a.b.c", "model@x",
]
VALUES = [
    "", "1", "0", "-1", "1e3", "1e999", "nan", "null", "true", "x", "mlp", "bone", "none", "digits", "[]",
    "[1]", "[a,b]", "{}", "{a:1}", "'", '"', "${seed}", "${nope}", "${", "1,2", "range(3)", "../x",
    "/etc/passwd", "\\", "a=b", "é", "9" * 30, "[" * 60 + "]" * 60, "\x00", "\ud800", " ", "MULTIRUN",
    "0.5", "16", "a\nb",
]
EXACT = {"seed": int, "threads": int, "train.lr": float, "train.steps": int, "data.limit": int}


def says(config, key):
    value = config.plain()
    for part in key.split("."):
        value = value[part]
    return value


def right(overrides) -> bool:
    """Compose; a number that was taken must be the one that was given."""
    composed = compose(list(overrides))
    for text in overrides if composed.config is not None else ():
        key, _, value = text.partition("=")
        if key in EXACT and overrides[-1] is text and not value.startswith("$"):
            found = says(composed.config, key)
            if not math.isclose(found, EXACT[key](value)):
                return False
    return True


@sizes
def test_overrides(size, here):
    verdicts = Verdicts("overrides")
    for rng in cases(size, 4, 30, 2500):
        overrides = [f"{rng.choice(['', '', '', '', '+', '++', '~'])}{rng.choice(KEYS)}"
                     f"{rng.choice(['=', '=', '=', '=', '', '=='])}{rng.choice(VALUES)}"
                     for _ in range(rng.choice([1, 1, 2, 3]))]
        verdicts.judge(overrides, lambda given=overrides: right(given))
    verdicts.check()


@sizes
def test_experiment_files(size, here):
    (here / "experiment").mkdir()
    target = here / "experiment" / "odd.yaml"
    known = [path.read_bytes() for path in sorted(CONF.glob("*.yaml"))]
    assert len(known) == len(experiments())
    verdicts = Verdicts("experiment files")
    for rng in cases(size, 4, 30, 2500):
        data = mutated(rng.choice(known), rng)
        target.write_bytes(data)
        verdicts.judge(data, lambda: right(["experiment=odd", f"hydra.searchpath=[file://{here}]"]))
    verdicts.check()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path
