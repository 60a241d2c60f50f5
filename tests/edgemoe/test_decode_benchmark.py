"""The decode benchmark: the peer's file is the same model, ratios are right, a killed run goes on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
FOLDER = Path(__file__).parents[2] / "benchmarks" / "edgemoe_decode"
NAMES = ("files", "lines", "make_gguf", "measuring", "report", "run")


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules, which are no package: they are forgotten afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield type("Modules", (), {name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def files(bench, tmp_path_factory):
    return bench.files.prepare(tmp_path_factory.mktemp("decode"), bench.files.SMALL)


def test_the_gguf_file_holds_the_model_in_the_bits_that_are_said(bench, files):
    import transformers

    model = transformers.OlmoeForCausalLM.from_pretrained(files["model"], dtype=torch.float32)
    same = bench.files.dequantized(files["model"], files["gguf"]).state_dict()  # every tensor is used once
    far = {"experts": 0.1, "proj": 0.01, "embed": 0.01, "lm_head": 0.01, "norm": 0, "gate.weight": 0}
    for name, tensor in model.state_dict().items():
        kind = next(k for k in far if k in name)
        error = (same[name] - tensor).norm() / tensor.norm()
        assert error <= far[kind] and (error > far[kind] / 4 or not far[kind]), (name, float(error))
    experts = [t for t in gguf.GGUFReader(files["gguf"]).tensors if "exps" in t.name]
    assert len(experts) == 6 and {8 * t.n_bytes / t.n_elements for t in experts} == {4.5}
    layer = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.OLMOE]  # what llama.cpp asks for, and nothing else
    wanted = {gguf.TENSOR_NAMES[t].format(bid=n) + ".weight" for t in layer for n in range(2)}
    assert {t.name for t in gguf.GGUFReader(files["gguf"]).tensors} == wanted


def test_what_the_file_says_of_the_model(files):
    read = gguf.GGUFReader(files["gguf"])
    said = {k.removeprefix("olmoe."): f.contents() for k, f in read.fields.items() if "olmoe." in k}
    assert said == {"context_length": 1024, "embedding_length": 256, "block_count": 2,
                    "feed_forward_length": 128, "attention.head_count": 2, "attention.head_count_kv": 2,
                    "attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "rope.freq_base": 10000.0,
                    "expert_count": 16, "expert_used_count": 4, "vocab_size": 1024}


def rows_of(bench, key, what, values):
    return [{"line": key, "repeat": n, what: v, "load": 0.0} for n, v in enumerate(values)]


def test_a_ratio_is_the_median_of_pairs_with_the_peers_best_threads(bench):
    rate = "tokens_per_second"
    rows = [*rows_of(bench, "ours, 75 %, -t 1", rate, [10, 20, 30]),
            *rows_of(bench, "llama.cpp mmap, 75 %, -t 1", rate, [1, 1, 1]),
            *rows_of(bench, "llama.cpp mmap, 75 %, -t 2", rate, [2, 8, 5]),
            *rows_of(bench, "ours, none, -t 1", "cpu_ms", [30, 50]),
            *rows_of(bench, "llama.cpp repacked, none, -t 2", "cpu_ms", [20, 20]),
            *rows_of(bench, "device, none, -t 1", "reader_of_raw", [0.7, 0.9, 0.8])]
    found = {r["name"]: r for r in bench.report.ratios(bench.report.Measured(bench.lines.lines(), rows))}
    first = found["ours / llama.cpp mmap at 75 %"]
    assert first["measured"] == 5 and first["of"] == ["ours, 75 %, -t 1", "llama.cpp mmap, 75 %, -t 2"]
    assert found["ours / llama.cpp mmap at 56 %"]["measured"] is None
    assert found["CPU of a token, all cached: ours / llama.cpp repacked"]["measured"] == 2
    assert found["reader / raw device, at an expert's size"]["measured"] == 0.8


def test_lines_have_names_of_their_own_and_the_ratios_find_them(bench):
    keys = [line.key for line in bench.lines.lines()]
    assert len(set(keys)) == len(keys)
    starts = [s for _, a, b, *_ in bench.report.RATIOS for s in (a, b)]
    for start in (*starts, *(s for _, s, *_ in bench.report.SHARES)):
        assert any(k.startswith(start) for k in keys), start


def test_a_run_that_was_killed_goes_on_where_it_was(bench, files, tmp_path):
    """The row that was being written is measured again, and what could not be run; the others are not."""
    chosen = [line for line in bench.lines.lines() if line.worker == "llama"]
    rows = [json.dumps({"line": line.key, "repeat": 0, "load": 0.0}) + "\n" for line in chosen]
    (tmp_path / "rows.jsonl").write_text(rows[0] + rows[1] + rows[2][:-9])
    for _ in range(2):
        runner = bench.run.Runner(tmp_path, bench.run.FORMS[True], files, None)
        assert [runner.measured(line, 0) for line in chosen[:4]] == [True, True, False, False]
        assert not runner.measured(chosen[0], 1)
        assert "pip install llama-cpp-python" in runner.measure(chosen[3], 0)["skipped"]
        assert runner.measured(chosen[3], 0) and runner.path.read_text() == rows[0] + rows[1]


@pytest.mark.slow
def test_the_engine_is_measured_in_a_process_of_its_own(bench, files, tmp_path):
    (line,) = [x for x in bench.lines.lines() if x.key == "IO-EXP, none, -t 1"]
    row = bench.run.Runner(tmp_path, bench.run.FORMS[True], files, None).measure(line, 0)
    size = 3 * 256 * 128 * 2  # of an expert in bfloat16, whole pages
    assert row["read_mb"] == pytest.approx(2 * 4 * size / 1e6) and row["hit_rate"] == 0
    assert row["tokens_per_second"] > 0 and row["cpu_ms"] > 0 and row["peak_mb"] > row["base_mb"]


@pytest.mark.slow
def test_the_smoke_form_runs_through(tmp_path):
    """With llama.cpp where POISE_LLAMA names it; its logits are then those of the dequantized model."""
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), "--smoke", "--folder", str(tmp_path)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peer = "POISE_LLAMA" in os.environ
    assert ("llama.cpp is not there" in done.stdout) != peer and "failed" not in done.stdout
    assert not list(tmp_path.iterdir())  # nothing is kept
