"""Bytes of what a run leaves behind: read as they were written, or refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import Verdicts, cases, mutated, sizes

import poise
from poise import load_adapter, save_adapter
from poise.files import load_bundle, load_meta
from poise.report.loading import load
from poise.report.tables import report
from poise.runs.checkpoint import Checkpoints
from poise.testing.adapter import small_model
from poise_bone import Bone

TINY = ["threads=1", "model.hidden=[8]", "data.limit=100", "train.steps=2", "train.eval_every=1",
        "train.checkpoint_every=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("fuzzed") / "run"
    poise.run([*TINY, f"hydra.run.dir={folder}"])
    return folder


def altered(folder: Path, target: Path, rng, pattern="**/*"):
    """Copy a folder and mutate one of its files; return the copy and the mutated file."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    file = rng.choice(sorted(p for p in target.glob(pattern) if p.is_file() and p.stat().st_size))
    file.write_bytes(mutated(file.read_bytes(), rng))
    return file


@sizes
def test_records(size, run, tmp_path):
    """What is shown is text in any case; a number that changed cannot be told, but must be a number."""
    verdicts = Verdicts("records")
    for rng in cases(size, 6, 60, 4000):
        file = altered(run, tmp_path / "run", rng, "*.*")
        verdicts.judge(file.name, lambda: isinstance(report(load([tmp_path / "run"])), str))
    verdicts.check()


@sizes
def test_bundles(size, run, tmp_path):
    want, _ = load_bundle(run / "final")
    verdicts = Verdicts("bundles")
    for rng in cases(size, 6, 60, 6000):
        file = altered(run, tmp_path / "run", rng, "final*")
        verdicts.judge(file.name, lambda: _same(load_bundle(tmp_path / "run" / "final")[0], want))
    verdicts.check()


@sizes
def test_checkpoints(size, run, tmp_path):
    """A damaged one is skipped for an older one: whichever is taken holds what was saved at its step."""
    number = load_meta(run / "checkpoints" / "step-00000002")["run"]
    saved = {step: load_bundle(run / "checkpoints" / f"step-{step:08d}")[0] for step in (1, 2)}

    def right():
        found = Checkpoints(tmp_path / "run" / "checkpoints", run=number).newest()
        return found is not None and _same(found.tensors, saved[found.step])

    verdicts = Verdicts("checkpoints")
    for rng in cases(size, 6, 60, 6000):
        file = altered(run, tmp_path / "run", rng, "checkpoints/*")
        verdicts.judge(file.name, right)
    verdicts.check()


@sizes
def test_adapters(size, tmp_path):
    model = small_model()
    attached = Bone(r=4).attach(model)
    save_adapter(attached, tmp_path / "kept")
    want = {n: t.clone() for n, t in attached.state_dict().items()}
    base = small_model().state_dict()
    verdicts = Verdicts("adapters")

    def same():
        plain = small_model()
        plain.load_state_dict(base)
        return _same(load_adapter(plain, tmp_path / "copy").state_dict(), want)

    for rng in cases(size, 6, 60, 4000):
        file = altered(tmp_path / "kept", tmp_path / "copy", rng)
        verdicts.judge(file.name, same)
    verdicts.check()


def _same(found, want):
    return found.keys() == want.keys() and all(torch.equal(t, want[n]) for n, t in found.items())
