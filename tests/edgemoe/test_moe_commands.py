"""`poise moe`: from a directory to text, and every wrong word in one line."""

from __future__ import annotations

import json

import pytest
from moe_models import saved

from poise.cli.main import main
from poise_edgemoe import Engine
from poise_edgemoe.store.index import read_index


def moe(capsys, *argv):
    """Return exit code, stdout and stderr of `poise moe ...`."""
    code = main(["moe", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def source(tmp_path):
    return saved(tmp_path / "model", "olmoe")


def test_from_a_directory_to_text(source, tmp_path, capsys):
    store = tmp_path / "store"
    (tmp_path / "plan.json").write_text(json.dumps({"*.down": 8}))
    code, out, err = moe(capsys, "convert", source, store, "--bits", 2, "--group", 8, "--plan",
                         tmp_path / "plan.json", "--hot", "raw")
    assert code == 0 and out.strip() == str(store)
    assert {q["bits"] for q in read_index(store).quantizers} == {2, 8}
    code, out, _ = moe(capsys, "inspect", store)
    assert code == 0 and "olmoe, 2 layers of 4 experts, computed in float32" in out
    assert "gate_up, 2 bits, affine, group 8" in out and "down, 8 bits" in out and "hot.safetensors" in out
    code, out, _ = moe(capsys, "plan", store, "--context", 64, "--memory", "20MB")
    assert code == 0 and "in all" in out and "all experts stay in memory" in out
    given = ("generate", store, "--prompt", "On weights: ", "--max-new-tokens", 9, "--context", 64)
    code, out, err = moe(capsys, *given)
    with Engine.open(store, context=64) as engine:
        assert code == 0 and out == engine.generate("On weights: ", 9) + "\n"
    assert "hot weights" in err and "of experts were in memory" in err
    drawn = [moe(capsys, *given, "--do-sample", "--seed", s)[1] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("argv", "words"), [
    (("convert", "gone", "s"), "gone has no config.json: give a transformers directory"),
    (("convert", "gone", "s", "--bits", "5"), "Convert.bits=5 is not allowed: it must be one of 2, 3, 4"),
    (("convert", "gone"), "moe convert: the following arguments are required: store"),
    (("inspect", "gone"), "gone is no store: it has no index.json"),
    (("plan", "gone", "--memroy", "1GB"), "takes no option '--memroy'; did you mean '--memory'?"),
    (("generate", "gone"), "moe generate needs --prompt TEXT"),
    (("generate", "gone", "--prompt", "x", "--top-p", "2"), "Generate.top_p=2.0 is not allowed"),
    (("genrate",), "moe has no verb 'genrate'; did you mean 'generate'?"),
])
def test_a_wrong_word_is_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = moe(capsys, *argv)
    assert code in (1, 2) and not out and words in err and err.count("\n") == 1


def test_a_limit_that_is_too_small_says_which_is_not(source, tmp_path, capsys):
    store = tmp_path / "store"
    moe(capsys, "convert", source, store)
    code, _, err = moe(capsys, "generate", store, "--prompt", "x", "--memory", "1kB")
    assert code == 2 and "memory=1kB is too small: the smallest workable value is" in err


def test_help_needs_no_torch():
    import subprocess
    import sys

    code = ("import sys; from poise.cli.main import main; main(['moe', 'convert', '--help']); "
            "main(['moe']); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--scheme SCHEME" in done.stdout and "convert" in done.stdout
