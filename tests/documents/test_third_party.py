"""The adapters of docs/writing-a-plugin.md, installed from a temporary folder as a third party would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("third party")  # they share an installation
PAGE = (Path(__file__).parents[2] / "docs" / "writing-a-plugin.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the three files of the page and install them into a folder of their own."""
    source = tmp_path_factory.mktemp("poise-two-adapters")
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


def test_each_adapter_takes_less_than_fifty_lines() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert max(len([line for line in c.splitlines() if line.strip()]) for c in code) < 50


def test_they_are_listed_and_described(site: Path, tmp_path: Path) -> None:
    listed = run(site, "-m", "poise.cli.main", "list", "adapter", cwd=tmp_path)
    assert "row_gain" in listed and "rank_one" in listed
    text = run(site, "-m", "poise.cli.main", "describe", "adapter", "rank_one", cwd=tmp_path)
    assert "exclude_modules: list[str] or null = None" in text and "scale: float = 1.0" in text


def test_they_keep_the_contract(site: Path, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)[-1]
    checked = run(site, "-c", code, cwd=tmp_path).splitlines()
    assert len(checked) == 3 and all("adapter files" in line for line in checked)
    assert "several adapters" in checked[1] and "holds its weights alone" in checked[2]


def test_the_one_whose_base_trains_does_so_in_a_run(site: Path, tmp_path: Path) -> None:
    out = run(site, "-m", "poise.cli.main", "run", "adapter=row_gain", 'adapter.exclude_modules=["5"]',
              "train.steps=30", cwd=tmp_path)
    assert "test_accuracy" in out


@pytest.mark.slow  # on packed weights the kit holds it to its contract by default
def test_the_one_that_freezes_its_base_trains_on_a_packed_one(site: Path, tmp_path: Path) -> None:
    """A model is saved, packed to four bits in a run, adapted, and ends as a plain directory."""
    code = """
from poise.models.causal_lm import save_model
from poise.models.components import CausalLM

component = CausalLM(architecture="LlamaForCausalLM", hidden_size=16)
save_model(component.build(), component.tokenizer(), "base")
open("text.txt", "w").write("A weight on a balance. " * 200)
"""
    run(site, "-c", code, cwd=tmp_path)
    run(site, "-m", "poise.cli.main", "run", "recipe=finetune", "model=causal_lm", "model.path=base",
        "data=text", "data.path=text.txt", "quantizer=absmax", "quantizer.group=8", "adapter=rank_one",
        "train.steps=3", "train.batch_size=2", "recipe.length=16", "recipe.eval_examples=2",
        "hydra.run.dir=out", cwd=tmp_path)
    assert (tmp_path / "out" / "folded" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "adapter" / "adapter.json").is_file()
