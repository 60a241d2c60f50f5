"""Files of data with bytes changed: each is read as it stands, or refused in one line.

What is right is told by a second reader for the formats without checksums (whose changed bytes are other
data), and is the original for those with.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fuzzing import Verdicts, cases, mutated, sizes

from poise.data import packaged, tabular
from poise.data.components import Tabular
from poise.data.images import read_idx
from poise.data.math import read_problems
from poise.data.pixels import decode
from poise.data.splits import read_bytes, read_text
from poise.errors import DataError
from poise.files import checksum

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from poise.models import smollm2  # noqa: E402
from poise.models.causal_lm import save_model  # noqa: E402
from poise.models.components import CausalLM  # noqa: E402

RNG = np.random.default_rng(0)


def campaign(size: int, path: Path, read, right, region=None) -> None:
    """Change a file again and again: what is read is right by what it holds then, or it is refused."""
    whole = path.read_bytes()
    first, last = region(whole) if region else (0, len(whole))

    def act():
        found = read(path)
        return right(path.read_bytes(), found)

    assert act()
    verdicts = Verdicts(path.name)
    for number, rng in enumerate(cases(size, 5, 40, 3000)):
        path.write_bytes(whole[:first] + mutated(whole[first:last], rng) + whole[last:])
        verdicts.judge(number, act)
    path.write_bytes(whole)
    verdicts.check()


def read_table(path: Path) -> tabular.Table:
    """Read a table, and make numbers of it as a run does."""
    table = tabular.read(path)
    with suppress(DataError):  # of no use as a target; the table may be right
        splits = Tabular(path=str(path), test=0, validation=0).load()
        assert np.isfinite(splits.train.x).all() and np.isfinite(splits.train.y).all()
    return table


# ------------------------------------------------------------------ formats without checksums


@sizes
def test_tables(size, tmp_path):
    rows = [f"{a:.6f},{b},{c}" for a, b, c in zip(RNG.normal(size=30), range(30), RNG.normal(size=30))]
    (tmp_path / "t.csv").write_text("alpha,beta,y\n" + "\n".join(rows) + "\n")
    missing = {"", "?", "NA", "nan", "NaN", "null", "NULL", "None", "-nan", "-NaN"}

    def cell(value, text):
        text = text.lstrip(" ")
        if isinstance(value, str):
            return value == text
        if text.strip() in missing or np.isnan(value):
            return text.strip() in missing and np.isnan(value)
        return float(value) == float(text)

    def right(raw, table):
        lines = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""), skipinitialspace=True))
        head, *body = [line for line in lines if line]
        body = [line for line in body if line != [" " * len(line[0])]]
        values = table.frame.to_numpy(dtype=object)
        return len(values) == len(body) and all(
            cell(value, text) for row, line in zip(values, body)
            for value, text in zip(row, line + [""] * (len(head) - len(line)), strict=True))

    campaign(size, tmp_path / "t.csv", read_table, right)


@sizes
def test_problems(size, tmp_path):
    lines = [json.dumps({"question": f"{i} + 2 = é?", "answer": f"so\n#### {i + 2}"}) for i in range(20)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))

    def right(raw, found):
        lines = [json.loads(line) for line in raw.decode("utf-8-sig").split("\n") if line.strip()]
        return [(e.prompt, e.completion) for e in found[0]] == [
            (line["question"].strip() + "\n", line["answer"].strip()) for line in lines]

    campaign(size, tmp_path / "p.jsonl", read_problems, right)


@sizes
def test_idx(size, tmp_path):
    array = RNG.integers(0, 256, (10, 5, 4), dtype=np.uint8)
    (tmp_path / "x").write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", *array.shape) + array.tobytes())

    def right(raw, found):
        return found.tobytes() == raw[16:] and found.shape == struct.unpack(">3I", raw[4:16])

    campaign(size, tmp_path / "x", lambda path: read_idx(path, 3, {}), right)


@sizes
def test_checkpoints(size, tmp_path):
    small = CausalLM(architecture="LlamaForCausalLM", hidden_size=4, heads=1, layers=1, vocab_size=20)
    folder = save_model(small.build(), None, tmp_path / "model")
    transformers.logging.disable_progress_bar()

    def right(raw, model):
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        state = model.state_dict()
        for name, entry in header.items():
            if name != "__metadata__" and name in state:
                first, last = entry["data_offsets"]
                if state[name].numpy().tobytes() != raw[8 + n + first : 8 + n + last]:
                    return False
        return state.keys() <= header.keys()

    def read(_):
        return CausalLM(path=str(folder)).build()

    campaign(size, folder / "model.safetensors", read, right)
    # other sizes and functions are other models, so of the configuration only errors are asked
    campaign(size, folder / "config.json", read, lambda raw, model: True)


# ------------------------------------------------------------------ formats with checksums


@sizes
def test_gzip(size, tmp_path):
    text = "".join(f"line {i}\n" for i in range(200))
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(text.encode()))
    campaign(size, tmp_path / "t.txt.gz", read_text, lambda raw, found: found[0] == text)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "P"])
@sizes
def test_png(size, tmp_path, mode):
    from PIL import Image

    shape, dtype = ((9, 7, 3) if mode == "RGB" else (9, 7)), np.uint16 if mode == "I;16" else np.uint8
    image = Image.fromarray(RNG.integers(0, 256, shape).astype(dtype) * (250 if mode == "I;16" else 1))
    (image.quantize(16) if mode == "P" else image).save(tmp_path / "x.png")
    channels = 1 if mode in ("L", "I;16") else 3

    def read(path):
        return decode(read_bytes(path)[0], str(path), channels)

    whole = read(tmp_path / "x.png")
    campaign(size, tmp_path / "x.png", read, lambda raw, found: np.array_equal(found, whole))


@pytest.mark.parametrize("part", ["pages", "footer"])
@sizes
def test_parquet(size, tmp_path, part):
    """The footer has no checksum: other names and types there are other data, so it is only not to fail."""
    import pyarrow
    from pyarrow.parquet import write_table

    table = pyarrow.table({"x": RNG.normal(size=40), "kind": list("abcd") * 10, "y": list(range(40))})
    path = tmp_path / "t.parquet"
    write_table(table, path, write_page_checksum=True)
    wanted = table.to_pandas()

    def region(whole):
        start = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
        return (4, start) if part == "pages" else (start, len(whole))

    def right(raw, found):
        return part == "footer" or found.frame.equals(wanted)

    campaign(size, path, read_table, right, region=region)


@sizes
def test_gguf(size, tmp_path, monkeypatch):
    from gguf import GGUFWriter

    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b", "ab", "<end>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    entry = replace(packaged.PACKAGES["smollm2"], files={str(path): checksum(path)})
    monkeypatch.setitem(packaged.PACKAGES, "smollm2", entry)

    def read(_):
        smollm2.tokenizer.cache_clear()
        smollm2._reader.cache_clear()
        packaged.located.cache_clear()
        return smollm2.tokenizer()

    try:
        campaign(size, path, read, lambda raw, found: found.encode("ab") == [2])
    finally:
        smollm2.tokenizer.cache_clear()
        smollm2._reader.cache_clear()
