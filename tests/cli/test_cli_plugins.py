"""Plugins from elsewhere: a broken one is named and skipped, two that claim one name are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cases import some
from cli_helpers import TINY, Finished, shell

GOOD = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Part:
    size: int = 3

def register(registry):
    registry.add("adapter", "{name}", "{module}:Part", "a part from elsewhere")
"""
BROKEN = {
    "raises": "raise RuntimeError('out of order')",
    "does not import": "import a_package_that_nobody_has",
    "does not parse": "def register(registry:",
    "has no function": "nothing = 1",
    "raises on registering": "def register(registry):\n    raise ValueError('no thanks')",
    "registers half": GOOD.format(name="half", module="poise_other") + "    raise ValueError('half')",
    "claims a kind that is not": "def register(r):\n    r.add('adaptor', 'x', 'y:Z')",
    "leaves": "raise SystemExit(3)",
}


def distribution(folder: Path, module: str, code: str) -> None:
    """Install a tiny distribution: a module, and metadata with one entry point."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[poise.plugins]\n{module} = {module}:register\n")


def poise(folder: Path, *argv: str, **changes: str) -> Finished:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return shell(*argv, cwd=folder, PYTHONPATH=path, **changes)


def test_a_plugin_from_elsewhere_is_listed_described_and_chosen(tmp_path):
    distribution(tmp_path, "poise_other", GOOD.format(name="other", module="poise_other"))
    assert "other" in poise(tmp_path, "list", "adapter").is_done().out
    assert "size: int = 3" in poise(tmp_path, "describe", "adapter", "other").is_done().out
    shown = poise(tmp_path, "run", "--cfg", "job", "adapter=other", "adapter.size=4").is_done().out
    assert "entry: other" in shown and "size: 4" in shown


@pytest.mark.parametrize("code", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_plugin_is_named_and_the_others_work(tmp_path, code):
    distribution(tmp_path, "poise_other", code)
    done = poise(tmp_path, "list", "adapter").is_done()
    assert "bone" in done.out and "compander" in done.out and "half" not in done.out
    assert "'poise_other'" in done.complaint and "POISE_STRICT=1" in done.complaint
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "argv", some([["--cfg", "job"], [*TINY]], keep=[["--cfg", "job"]]), ids=["shown", "run"])
def test_a_run_goes_on_beside_a_broken_plugin(tmp_path, argv):
    distribution(tmp_path, "poise_other", BROKEN["raises"])
    assert "'poise_other'" in poise(tmp_path, "run", *argv).is_done().complaint


def test_the_traceback_of_a_broken_plugin_is_there_for_who_asks(tmp_path):
    distribution(tmp_path, "poise_other", BROKEN["raises"])
    strict = poise(tmp_path, "list", POISE_STRICT="1")
    assert strict.code != 0 and "out of order" in strict.err and "Traceback" in strict.err


@pytest.mark.parametrize("argv", [["list"], ["run", "--cfg", "job"], ["run"]], ids=" ".join)
def test_two_plugins_that_claim_one_name_are_refused_and_both_named(tmp_path, argv):
    distribution(tmp_path, "poise_other", GOOD.format(name="bone", module="poise_other"))
    refused = poise(tmp_path, *argv)
    refused.refuses(2, "adapter=bone", "'bone'", "'poise_other'", "rename one or uninstall one")
    assert not (tmp_path / "runs").exists()
