"""The adapter of docs/writing-a-plugin.md, installed from a temporary folder as a third party would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "writing-a-plugin.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the three files of the page and install them into a folder of their own."""
    source = tmp_path_factory.mktemp("poise-row-gain")
    for name, text in re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)```", PAGE, re.S | re.M):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--target", str(target), str(source)],
        check=True, capture_output=True,
    )
    return target


def run(site: Path, *argv: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_shows_less_than_sixty_lines() -> None:
    code = max(re.findall(r"```python\n(.*?)```", PAGE, re.S), key=len)
    assert len([line for line in code.splitlines() if line.strip()]) < 60


def test_it_is_listed_and_described(site: Path, tmp_path: Path) -> None:
    assert "row_gain" in run(site, "-m", "poise.cli.main", "list", "adapter", cwd=tmp_path)
    text = run(site, "-m", "poise.cli.main", "describe", "adapter", "row_gain", cwd=tmp_path)
    assert "exclude: list[str] = []" in text


def test_it_keeps_the_contract(site: Path, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)[-1]
    run(site, "-c", code, cwd=tmp_path)


def test_it_trains_in_a_run(site: Path, tmp_path: Path) -> None:
    out = run(site, "-m", "poise.cli.main", "run", "adapter=row_gain", 'adapter.exclude=["5"]',
              "train.steps=30", cwd=tmp_path)
    assert "test_accuracy" in out
