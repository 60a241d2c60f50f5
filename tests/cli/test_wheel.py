"""The wheel, installed for real on its own: it brings its choices along and needs no clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli_helpers import environment

ROOT = Path(__file__).parents[2]
PYTHONS = ["this", "python3.12", "python3.13"]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def sh(*argv: object, cwd: Path) -> str:
    """Run a command without anything of this environment's Python; return its output."""
    clean = environment(PYTHONPATH=None, POISE_CONF=None, POISE_OUT=None, VIRTUAL_ENV=None)
    done = subprocess.run(
        [str(a) for a in argv], cwd=cwd, env=clean, capture_output=True, text=True, check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel, and an empty folder to work in."""

    bin: Path
    cwd: Path

    def poise(self, *argv: str) -> str:
        return sh(self.bin / "poise", *argv, cwd=self.cwd)

    def python(self, code: str) -> str:
        return sh(self.bin / "python", "-c", code, cwd=self.cwd).strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the clone."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source") / "poise", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("core", "plugins", "conf", "pyproject.toml", "README.md", "LICENSE"):
        here = ROOT / name
        if here.is_dir():
            shutil.copytree(here, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, source / name)
    isolation = ["--no-isolation"] if find_spec("hatchling") else []
    sh(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", out, source, cwd=source)
    (path,) = out.glob("poise-*.whl")
    return path


def interpreter(name: str) -> str:
    """Return a working interpreter, or skip."""
    if name == "this":
        return sys.executable
    found = shutil.which(name)
    works = found and subprocess.run(
        [found, "-c", "import venv, ensurepip"], capture_output=True, check=False).returncode == 0
    if not works:
        pytest.skip(f"no working {name} on PATH")
    return str(found)


@pytest.fixture(scope="module", params=PYTHONS)
def installed(request, wheel, tmp_path_factory) -> Installed:
    """A fresh environment with the wheel and one extra."""
    folder = tmp_path_factory.mktemp(request.param)
    cwd = folder / "empty"
    cwd.mkdir()
    sh(interpreter(request.param), "-m", "venv", folder / "venv", cwd=cwd)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "-q"]
    sh(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[compander]", cwd=cwd)
    return Installed(folder / "venv/bin", cwd)


def test_the_wheel_holds_the_choices_and_every_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in (p for p in (ROOT / "conf").rglob("*") if p.suffix in (".yaml", ".py")):
        assert f"poise_conf/{path.relative_to(ROOT / 'conf')}" in names
    for package in ("poise", "poise_edgemoe", "poise_bone", "poise_quantagg", "poise_compander"):
        assert f"{package}/py.typed" in names
    for folder in (ROOT / "core", *(ROOT / "plugins").iterdir()):  # without its headers C is not built
        for path in (p for p in folder.rglob("*") if p.suffix in (".c", ".h")):
            assert str(path.relative_to(folder)) in names
    tops = {n.split("/")[0] for n in names}
    assert not tops & {"core", "plugins", "conf", "tests", "docs", "benchmarks"}


def test_no_clone_is_in_sight(installed):
    root = installed.python("import poise.compose; print(poise.compose.conf_root())")
    assert root == "pkg://poise_conf"
    where = installed.python("import poise; print(poise.__file__)")
    assert where.startswith(str(installed.bin.parent)) and not where.startswith(str(ROOT) + os.sep)


def test_everything_is_listed(installed):
    text = installed.poise("list")
    for name in ("bone", "compander", "quantile", "edgemoe_bits", "mlp", "digits"):
        assert f"  {name} " in text


def test_a_configuration_is_shown_with_its_experiments(installed):
    assert "entry: resnet20" in installed.poise(
        "run", "--cfg", "job", "experiment=compander_digits", "hydra.mode=RUN")


def test_a_run_and_a_sweep_work(installed):
    assert "test_accuracy" in installed.poise("run", "train.steps=20", "threads=1")
    swept = installed.poise("run", "-m", "train.steps=20", "threads=1", "adapter=none,compander")
    assert "adapter=compander" in swept
    assert "test_accuracy" in installed.poise("report", "runs")
