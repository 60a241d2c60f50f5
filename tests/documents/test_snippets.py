"""Every Python block of the README and of the method cards runs as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("plugins/*/README.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


CASES = [(page, i) for page in PAGES for i in range(len(blocks(page)))]
EACH = """
import json, os, sys
for number, block in enumerate(json.load(sys.stdin)):
    os.mkdir(str(number))
    os.chdir(str(number))
    print(f"block {number}", file=sys.stderr)
    exec(compile(block, f"block {number}", "exec"), {"__name__": "__main__"})
    os.chdir("..")
"""


def runs(code: str, folder: Path, given: str = "") -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POISE_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, input=given,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """In one process, each with names and a folder of its own."""
    runs(EACH, tmp_path, json.dumps(blocks(page)))


@pytest.mark.slow
@pytest.mark.parametrize(("page", "index"), CASES, ids=[f"{p.parent.name}-{i}" for p, i in CASES])
def test_a_block_runs(page: Path, index: int, tmp_path: Path) -> None:
    runs(blocks(page)[index], tmp_path)


def test_every_card_shows_library_use() -> None:
    assert all(blocks(page) for page in PAGES)
