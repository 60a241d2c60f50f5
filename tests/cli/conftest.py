"""Fixtures of the command-line tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli_helpers import TINY

import poise


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """An empty current directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("POISE_OUT", raising=False)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with two finished runs, `a` (seed 0) and `b` (seed 1, wider). Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    poise.run([*TINY, f"hydra.run.dir={folder}/a"])
    poise.run([*TINY, "seed=1", "model.hidden=[12]", f"hydra.run.dir={folder}/b"])
    return folder


@pytest.fixture
def tmpfs(tmp_path: Path):
    """A function that mounts a small file system of a given size, or skips."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True,
            text=True, check=False,
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)
