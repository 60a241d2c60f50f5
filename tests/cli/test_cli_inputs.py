"""What a run reads of others: a resume finds it from anywhere, moved or not, and takes nothing else."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import call, contents, cut_back, edit_json, result

import poise
from poise.hooks import Input, Reads
from poise.runs import origin
from poise.runs.origin import load_origin, look_at
from poise.runs.records import load_run

TEXT = "".join(f"line {i} of {i * i}\n" for i in range(400))
FINETUNE = (
    "recipe=finetune", "recipe.length=16", "recipe.eval_examples=4", "recipe.save_folded=false",
    "threads=1", "train.steps=6", "train.batch_size=2", "train.eval_every=3", "train.checkpoint_every=3",
    "train.log_every=1",
)
RANDOM = ("model=causal_lm", "model.architecture=LlamaForCausalLM", "model.hidden_size=8", "model.layers=1",
          "model.heads=2", "model.intermediate_size=8", "model.context=32")
IMAGES = (
    "data=images", "data.path=pictures", "model.hidden=[4]", "threads=1", "train.steps=6",
    "train.batch_size=4", "train.eval_every=3", "train.checkpoint_every=3",
)


@pytest.fixture
def read(here) -> Path:
    """A run on a text file named by a relative path, interrupted after its checkpoint at 3."""
    (here / "data").mkdir()
    (here / "data/book.txt").write_text(TEXT)
    poise.run([*FINETUNE, *RANDOM, "data=text", "data.path=data/book.txt", "hydra.run.dir=whole"])
    return interrupted(here)


def interrupted(here: Path) -> Path:
    """Copy the run `whole` as an interrupt after its checkpoint at 3 would have left it."""
    shutil.copytree(here / "whole", here / "run")
    (here / "run/final.safetensors").touch()
    (here / "run/final.json").touch()
    cut_back(here / "run", 3)
    edit_json(here / "run/status.json", state="interrupted", reason="interrupted at step 3 of 6")
    return here / "run"


def trained(directory: Path) -> tuple[list, dict]:
    """Return what a run and its resumed twin agree on: rows and final metrics."""
    one = load_run(directory)
    rows = [(r["step"], r["name"], r["value"]) for r in one.rows]
    return rows, {k: v for k, v in one.metrics.items() if not k.endswith("seconds")}


def refused(capsys, directory: Path, *words: object, also: tuple[object, ...] = ()) -> None:
    """Check that a resume is refused and leaves every file as it was."""
    before = contents(directory)
    call(capsys, "run", f"resume={directory}", *also).refuses(1, *words)
    assert contents(directory) == before


def test_a_relative_path_is_found_from_another_working_directory(capsys, read, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    call(capsys, "run", f"resume={read}").is_done()
    assert trained(read) == trained(read.parent / "whole")
    assert load_run(read).config == load_run(read.parent / "whole").config


def test_data_that_moved_are_asked_for_and_taken_when_they_are_the_same(capsys, read):
    (read.parent / "data").rename(read.parent / "moved")
    refused(capsys, read, f"data.path={read.parent}/data/book.txt", "does not exist", "data.path=NEW")
    refused(capsys, read, "data.path=", "nowhere.txt does not exist", also=("data.path=nowhere.txt",))
    assert load_run(read).state == "interrupted"
    call(capsys, "run", f"resume={read}", "data.path=moved/book.txt").is_done()
    assert trained(read) == trained(read.parent / "whole")
    recorded = load_origin(read)
    assert recorded is not None
    assert recorded.inputs["data.path"]["path"] == f"{read.parent}/moved/book.txt"


def test_data_that_changed_are_refused_with_both_checksums(capsys, read):
    book = read.parent / "data/book.txt"
    before = look_at({"": Input(book)})[""]["checksum"]
    book.write_text(TEXT.replace("7", "8"))
    now = look_at({"": Input(book)})[""]["checksum"]
    refused(capsys, read, book, before, now)
    book.write_text(TEXT)
    (read.parent / "other.txt").write_text(TEXT + "more")
    refused(capsys, read, "other.txt", before, also=("data.path=other.txt",))
    call(capsys, "run", f"resume={read}").is_done()


@pytest.fixture
def pictures(here) -> Path:
    """A folder with images of two classes."""
    from PIL import Image

    for name, shade in (("dark", 40), ("light", 200)):
        (here / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (4, 4), shade + i).save(here / "pictures" / name / f"{i}.png")
    return here / "pictures"


def test_images_that_were_deleted_or_added_are_refused(capsys, here, pictures):
    poise.run([*IMAGES, "hydra.run.dir=whole"])
    directory = interrupted(here)
    spare = (pictures / "dark/3.png").read_bytes()
    (pictures / "dark/3.png").unlink()
    refused(capsys, directory, pictures, "sha256 of 24 files:", "sha256 of 23 files:")
    (pictures / "dark/3.png").write_bytes(spare)
    (pictures / "light/12.png").write_bytes(spare)
    refused(capsys, directory, pictures, "sha256 of 24 files:", "sha256 of 25 files:")
    (pictures / "light/12.png").unlink()
    (pictures / "a note.txt").write_text("is not read, and may change")
    call(capsys, "run", f"resume={directory}").is_done()
    assert result(directory) == result(here / "whole")


def test_a_model_that_moved_or_changed_is_treated_as_data_are(capsys, here):
    from poise.models.causal_lm import save_model
    from poise.models.components import CausalLM

    small = CausalLM(architecture="LlamaForCausalLM", hidden_size=8, layers=1, heads=2)
    save_model(small.build(), small.tokenizer(), "model")
    (here / "book.txt").write_text(TEXT)
    poise.run([*FINETUNE, "model=causal_lm", "model.path=model", "data=text", "data.path=book.txt",
               "hydra.run.dir=whole"])
    directory = interrupted(here)
    (here / "model").rename(here / "moved")
    refused(capsys, directory, f"model.path={here}/model", "does not exist", "model.path=NEW")
    config = (here / "moved/config.json").read_text()
    (here / "moved/config.json").write_text(config + "\n")
    refused(capsys, directory, f"model.path={here}/moved", "checksum", also=("model.path=moved",))
    (here / "moved/config.json").write_text(config)
    call(capsys, "run", f"resume={directory}", "model.path=moved").is_done()
    assert trained(directory) == trained(here / "whole")


def test_a_run_that_began_without_its_data_takes_them_when_they_are_there(capsys, here):
    words = ("run", *FINETUNE, *RANDOM, "data=text", "data.path=book.txt", "hydra.run.dir=run")
    call(capsys, *words).refuses(1, "book.txt does not exist")
    assert load_run("run").state == "failed"
    (here / "book.txt").write_text(TEXT)
    call(capsys, "run", "resume=run").is_done()


def test_a_resume_that_fails_at_its_start_leaves_the_status_as_it_was(capsys, read, monkeypatch):
    from poise.models.components import CausalLM

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    before = load_run(read).status
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "build", fail)
        assert "no memory" in call(capsys, "run", f"resume={read}").err
    assert load_run(read).status == before
    call(capsys, "run", f"resume={read}").is_done()


def test_of_a_large_file_beginning_size_and_time_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "WHOLE", 2 << 20)
    path = tmp_path / "large"
    path.write_bytes(bytes(3 << 20))
    first = look_at({"": Input(path)})
    copy = Path(shutil.copy2(path, tmp_path / "copy"))
    assert look_at({"": Input(copy)})[""]["checksum"] == first[""]["checksum"]
    path.write_bytes(bytes(3 << 20) + b"1")
    assert look_at({"": Input(path)}) != first


# ------------------------------------------------------------------ who reads what


OPTIONS = {"path", "labels", "test_path", "test_labels"}


def test_every_component_with_a_path_says_what_it_reads(tmp_path, monkeypatch):
    from poise.options import option_fields

    monkeypatch.delenv("POISE_DATA", raising=False)
    checked = set()
    for entry in poise.entries():
        component = entry.load() if entry.kind in ("data", "model") else None
        names = {f.name for f in option_fields(component)} & OPTIONS if component else set()
        if names:
            built = component(**{name: str(tmp_path / name) for name in names})
            assert isinstance(built, Reads), entry.name
            assert built.inputs().keys() == names
            assert {i.path for i in built.inputs().values()} == {tmp_path / name for name in names}
            checked.add(entry.name)
    assert checked >= {"tabular", "images", "cifar10", "text", "gsm8k", "causal_lm"}


def test_what_is_read_by_default_is_recorded_and_found_without_the_variable(capsys, here, monkeypatch):
    (here / "data/tabular").mkdir(parents=True)
    rows = "\n".join(["x,z,y", *(f"{i},{i % 7},{2 * i + i % 3}" for i in range(60))])
    (here / "data/tabular/own.csv.gz").write_bytes(gzip.compress(rows.encode()))
    monkeypatch.setenv("POISE_DATA", str(here / "data"))
    words = ("recipe=quantile", "model=none", "data=tabular", "data.name=own", "threads=1",
             "recipe.base=[linear]", "recipe.folds=2", "recipe.figures=false")
    poise.run([*words, "hydra.run.dir=run"])
    recorded = json.loads((here / "run/origin.json").read_text())["inputs"]
    assert recorded["data.path"]["path"] == str(here / "data/tabular/own.csv.gz")
    edit_json(here / "run/status.json", state="interrupted")
    monkeypatch.delenv("POISE_DATA")
    call(capsys, "run", "resume=run").is_done()
