"""Every Python block of the README and of the method cards runs as it stands."""

from __future__ import annotations

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


@pytest.mark.parametrize(("page", "index"), CASES, ids=[f"{p.parent.name}-{i}" for p, i in CASES])
def test_a_block_runs(page: Path, index: int, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POISE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", blocks(page)[index]], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_card_shows_library_use() -> None:
    assert all(blocks(page) for page in PAGES)
