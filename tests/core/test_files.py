"""Files are whole or not there: whatever is torn or altered is named, never loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.caches import cache_folder
from poise.errors import FileError
from poise.files import (
    checksum,
    load_arrays,
    load_bundle,
    load_meta,
    plain,
    read_json,
    remove_bundle,
    save_arrays,
    save_bundle,
    write_bytes,
    write_json,
    write_shards,
    write_text,
)

few = settings(max_examples=40, derandomize=True, deadline=None, database=None)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.fixture
def bundle(tmp_path):
    tensors = {"w": torch.arange(60.0).reshape(6, 10), "codes": torch.arange(20, dtype=torch.uint8)}
    save_bundle(tmp_path / "it", tensors, {"step": 3, "name": "x" * 200})
    return tmp_path / "it"


def damaged(stem, file, data, words=None):
    """Write damaged bytes and check that loading names the file."""
    path = stem.with_name(f"{stem.name}.{file}")
    path.write_bytes(data)
    for load in (load_bundle, load_arrays, load_meta):
        with pytest.raises(FileError, match=words) as caught:
            load(stem)
        assert str(path) in str(caught.value)


# ------------------------------------------------------------------ bundles


@few
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=4),
       st.dictionaries(st.text(max_size=5), st.one_of(
           st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False,
                                                                            allow_infinity=False),
           st.text(max_size=5), st.lists(st.integers(0, 9), max_size=3)), max_size=4))
def test_what_is_saved_is_loaded(tmp_path_factory, kinds, meta):
    stem = tmp_path_factory.getbasetemp() / "round" / "trip"
    g = torch.Generator().manual_seed(0)
    tensors = {f"t.{i}": torch.randint(0, 2, shape, generator=g).to(dtype)
               for i, (dtype, shape) in enumerate(kinds)}
    save_bundle(stem, tensors, meta)
    back, found = load_bundle(stem)
    assert found == meta == load_meta(stem)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_views_parameters_and_special_values_survive(tmp_path):
    base = torch.randn(4, 6)
    tensors = {"whole": base, "view": base[1:3], "turned": base.T, "leaf": torch.nn.Parameter(base),
               "odd": torch.tensor([float("nan"), float("inf"), -0.0])}
    save_bundle(tmp_path / "it", tensors, {})
    back, _ = load_bundle(tmp_path / "it")
    for name, tensor in tensors.items():
        assert back[name].numpy().tobytes() == tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize("file", ["json", "safetensors"])
@pytest.mark.parametrize("tenths", range(10))
def test_a_file_cut_anywhere_is_named(file, tenths, bundle):
    data = bundle.with_name(f"it.{file}").read_bytes()
    damaged(bundle, file, data[: len(data) * tenths // 10])


@pytest.mark.parametrize("tenths", range(10))
def test_one_flipped_byte_of_the_tensors_is_named(tenths, bundle):
    data = bytearray(bundle.with_name("it.safetensors").read_bytes())
    data[len(data) * tenths // 10] ^= 1
    damaged(bundle, "safetensors", bytes(data), "altered: its checksum does not match")


@pytest.mark.parametrize("tenths", range(10))
@pytest.mark.parametrize("bit", [1, 128])
def test_one_flipped_byte_of_the_index_is_named(tenths, bit, bundle):
    data = bytearray(bundle.with_name("it.json").read_bytes())
    data[len(data) * tenths // 10] ^= bit
    damaged(bundle, "json", bytes(data))


def test_bytes_at_the_end_are_named(bundle):
    damaged(bundle, "safetensors", bundle.with_name("it.safetensors").read_bytes() + b"\0", "torn")


def test_a_missing_half_is_named(bundle):
    bundle.with_name("it.safetensors").unlink()
    with pytest.raises(FileError, match=r"it\.safetensors is missing"):
        load_bundle(bundle)
    bundle.with_name("it.json").unlink()
    with pytest.raises(FileError, match=r"cannot read .*it\.json"):
        load_bundle(bundle)


def test_tensors_of_another_bundle_are_refused(bundle):
    other = bundle.with_name("other")
    save_bundle(other, {"w": torch.arange(60.0).reshape(6, 10) + 1,
                        "codes": torch.arange(20, dtype=torch.uint8)}, {})
    damaged(bundle, "safetensors", other.with_name("other.safetensors").read_bytes(), "altered")


def test_another_version_is_refused(bundle, monkeypatch):
    monkeypatch.setattr("poise.files.BUNDLE_VERSION", 2)
    with pytest.raises(FileError, match=r"it\.json has version 1; this Poise reads 2"):
        load_bundle(bundle)
    save_bundle(bundle, {}, {"a": 1})
    monkeypatch.undo()
    with pytest.raises(FileError, match=r"it\.json has version 2; this Poise reads 1"):
        load_meta(bundle)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"version": 1}', '"checksum"'])
def test_json_that_is_no_bundle_is_named(text, bundle):
    damaged(bundle, "json", text.encode(), "not a bundle of Poise")


def test_removing_leaves_nothing_and_may_be_repeated(bundle):
    remove_bundle(bundle)
    assert list(bundle.parent.iterdir()) == []
    remove_bundle(bundle)


def test_a_name_with_dots_is_one_name(tmp_path):
    for name in ("step-1.5", "step-1.6"):
        save_bundle(tmp_path / name, {}, {"name": name})
    assert load_meta(tmp_path / "step-1.5") == {"name": "step-1.5"}


# ------------------------------------------------------------------ arrays, without torch


ARRAY_TYPES = [np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_]


@few
@given(st.lists(st.tuples(st.sampled_from(ARRAY_TYPES), st.lists(st.integers(0, 4), max_size=3)),
                max_size=4))
def test_arrays_that_are_saved_are_loaded(tmp_path_factory, kinds):
    stem = tmp_path_factory.getbasetemp() / "arrays" / "trip"
    rng = np.random.default_rng(0)
    arrays = {f"a.{i}": rng.integers(0, 2, shape).astype(dtype) for i, (dtype, shape) in enumerate(kinds)}
    save_arrays(stem, arrays, {"n": len(arrays)})
    back, meta = load_arrays(stem)
    assert meta == {"n": len(arrays)} == load_meta(stem) and back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert np.array_equal(back[name], array)


def test_views_and_special_values_of_arrays_survive(tmp_path):
    base = np.random.default_rng(0).normal(size=(4, 6))
    arrays = {"turned": base.T, "every other": base[:, ::2], "backwards": base[::-1],
              "odd": np.array([np.nan, np.inf, -0.0, 5e-324])}
    save_arrays(tmp_path / "it", arrays, {})
    for name, array in load_arrays(tmp_path / "it")[0].items():
        assert array.tobytes() == np.ascontiguousarray(arrays[name]).tobytes()


def test_loaded_arrays_may_be_changed_and_leave_the_file_as_it_is(tmp_path):
    save_arrays(tmp_path / "it", {"a": np.zeros(3)}, {})
    load_arrays(tmp_path / "it")[0]["a"][:] = 1
    assert load_arrays(tmp_path / "it")[0]["a"].tolist() == [0, 0, 0]


def test_arrays_and_tensors_are_one_format(tmp_path):
    save_arrays(tmp_path / "arrays", {"w": np.arange(6.0).reshape(2, 3)}, {"n": 1})
    save_bundle(tmp_path / "tensors", {"w": torch.arange(6.0, dtype=torch.float64).reshape(2, 3)}, {"n": 1})
    for kind in ("json", "safetensors"):
        assert (tmp_path / f"arrays.{kind}").read_bytes() == (tmp_path / f"tensors.{kind}").read_bytes()
    assert torch.equal(load_bundle(tmp_path / "arrays")[0]["w"],
                       torch.from_numpy(load_arrays(tmp_path / "tensors")[0]["w"]))


def test_arrays_need_no_torch(tmp_path):
    code = f"""
import sys
import numpy as np
from poise.files import load_arrays, save_arrays
save_arrays({str(tmp_path / "it")!r}, {{"a": np.arange(3)}}, {{"n": 1}})
assert load_arrays({str(tmp_path / "it")!r})[0]["a"].tolist() == [0, 1, 2]
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ atomic writes


def test_a_write_replaces_all_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    for data in (b"first, longer", b"second", b""):
        write_bytes(path, data)
        assert path.read_bytes() == data
        assert [p.name for p in path.parent.iterdir()] == ["file"]
    write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "way").write_text("here")
    for target in (tmp_path / "way" / "file", tmp_path / "way" / "deep" / "file"):
        with pytest.raises(FileError, match=f"cannot write {target}"):
            write_bytes(target, b"x")
    assert (tmp_path / "way").read_text() == "here"


def test_a_folder_in_the_way_of_the_file_is_named(tmp_path):
    (tmp_path / "it").mkdir()
    with pytest.raises(FileError, match=r"cannot write .*it: "):
        write_bytes(tmp_path / "it", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)],
                          capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_old_file(small_disk):
    write_bytes(small_disk / "file", b"old")
    with pytest.raises(FileError, match=r"cannot write .*file: No space left on device"):
        write_bytes(small_disk / "file", bytes(200_000))
    assert (small_disk / "file").read_bytes() == b"old"
    assert [p.name for p in small_disk.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_bundle(small_disk):
    save_bundle(small_disk / "it", {"w": torch.ones(100)}, {"n": 1})
    with pytest.raises(FileError, match=r"cannot write .*it\.safetensors: No space left"):
        save_bundle(small_disk / "it", {"w": torch.ones(50_000)}, {"n": 2})
    assert load_meta(small_disk / "it") == {"n": 1}


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    """The same as a full disk, where none can be mounted."""
    write_bytes(tmp_path / "file", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(FileError, match="No space left on device"):
            patch.setattr(os, call, full)
            write_bytes(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------ JSON


def _write_model(folder: Path) -> None:
    from poise.models.causal_lm import save_model
    from poise.models.components import CausalLM

    small = CausalLM(architecture="LlamaForCausalLM", hidden_size=8, layers=1, heads=2)
    save_model(small.build(), small.tokenizer(), folder)


def _claim(folder: Path) -> None:
    from poise.runs.records import Records

    records = Records(folder)
    records.begin({})
    records.close()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_bytes(folder / "file", b"x"),
        lambda folder: write_json(folder / "deeper/and/deeper/file", 1),
        lambda folder: save_bundle(folder / "bundle", {"x": torch.zeros(1)}, {}),
        lambda folder: write_shards([("a", torch.zeros(9)), ("b", torch.zeros(9))], folder, shard_bytes=36),
        _write_model, _claim,
    ],
    ids=["file", "new folders", "bundle", "shards", "model", "records"],
)
def test_a_name_is_durable_once_the_write_returns(tmp_path, monkeypatch, write):
    """Whatever gives a file or folder its name is followed by an fsync of the folder that holds it."""
    pending: set[str] = set()

    def naming(function):
        def call(*args, **options):
            done = function(*args, **options)
            target = Path(args[0] if function is make else args[1])
            if not any(part.startswith(".") for part in target.parts):  # those are moved or removed again
                pending.add(str(target.parent))
            return done
        return call

    def sync(handle: int) -> None:
        synced(handle)
        pending.discard(os.readlink(f"/proc/self/fd/{handle}"))

    make, synced = os.mkdir, os.fsync
    for name in ("replace", "link", "mkdir"):
        monkeypatch.setattr(os, name, naming(getattr(os, name)))
    monkeypatch.setattr(os, "fsync", sync)
    write(tmp_path)
    assert pending == set()


def test_plain_values():
    value = {"a": np.float32(0.5), 2: np.arange(3), "t": torch.tensor(3), "p": Path("/x"), "s": (1, {2}),
             "n": [float("nan"), float("inf"), -np.inf], "m": torch.ones(2, 1), "b": np.bool_(True)}
    assert plain(value) == {
        "a": 0.5, "2": [0, 1, 2], "t": 3, "p": "/x", "s": [1, [2]], "n": ["nan", "inf", "-inf"],
        "m": [[1.0], [1.0]], "b": True}


def test_json_is_strict_and_read_back(tmp_path):
    write_json(tmp_path / "x.json", {"loss": float("nan"), "n": 3})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=None) == {"loss": "nan", "n": 3}
    assert read_json(tmp_path / "x.json") == {"loss": "nan", "n": 3}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_what_is_not_json_is_named(data, tmp_path):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(FileError, match=r"x\.json is not valid JSON \(torn or altered\)"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("place", ["missing.json", "."])
def test_what_cannot_be_read_is_named(place, tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        read_json(tmp_path / place)


def test_a_pipe_is_no_file_of_a_bundle(tmp_path):
    save_arrays(tmp_path / "it", {"a": np.zeros(2)}, {})
    for end in ("json", "safetensors"):
        whole = (tmp_path / f"it.{end}").read_bytes()
        (tmp_path / f"it.{end}").unlink()
        os.mkfifo(tmp_path / f"it.{end}")
        with pytest.raises(FileError, match=rf"cannot read .*it\.{end}: it is no regular file"):
            load_arrays(tmp_path / "it")  # and does not wait for a writer
        (tmp_path / f"it.{end}").unlink()
        (tmp_path / f"it.{end}").write_bytes(whole)
    assert load_arrays(tmp_path / "it")[0]["a"].shape == (2,)


def test_the_checksum_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert checksum(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ------------------------------------------------------------------ the cache


def test_the_cache_is_where_it_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "mine"))
    assert cache_folder("a", "b") == tmp_path / "mine" / "a" / "b"
    monkeypatch.delenv("POISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("a") == tmp_path / "xdg" / "poise" / "a"
    assert cache_folder("a").is_dir() and list(cache_folder("a").iterdir()) == []


def test_a_cache_that_cannot_be_written_moves_to_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "way").write_text("a file")
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "way" / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temp"))
    found = cache_folder("a")
    assert found.is_dir() and found == tmp_path / "temp" / f"poise-cache-{os.getuid()}" / "a"


def test_a_temporary_cache_that_somebody_else_made_is_not_taken(tmp_path, monkeypatch):
    """The name can be known beforehand: a link, or a folder that all may write to, waits there."""
    (tmp_path / "way").write_text("a file")
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "way" / "cache"))
    named, elsewhere = f"poise-cache-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("link", "open"):
        temporary = tmp_path / name
        temporary.mkdir()
        if name == "link":
            (temporary / named).symlink_to(elsewhere)
        else:
            (temporary / named).mkdir()
            (temporary / named).chmod(0o777)
        monkeypatch.setattr("tempfile.gettempdir", lambda temporary=temporary: str(temporary))
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        found = cache_folder("a")
        assert found.is_dir() and found.parent.name != named and found.parent.parent == temporary
        assert cache_folder("b").parent == found.parent  # the same for this process
        assert not list(elsewhere.iterdir())


# ------------------------------------------------------------------ shards


def pairs(n=5, value=0.0):
    return [(f"layer.{i}", torch.full((4, 4), value + i)) for i in range(n)]


def read_all(folder):
    from safetensors.torch import load_file

    return {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (128, 3), (1, 5), (64, 5)])
def test_a_stream_is_written_in_shards_with_an_index(tmp_path, limit, files):
    written = write_shards(iter(pairs()), tmp_path, shard_bytes=limit)
    assert len(written) == files == len(list(tmp_path.glob("*.safetensors")))
    assert all(torch.equal(read_all(tmp_path)[k], v) for k, v in pairs())
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        mapped = json.loads(index.read_text())
        assert mapped["metadata"]["total_size"] == 5 * 64 and len(mapped["weight_map"]) == 5
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_one_shard_is_held_at_a_time(tmp_path):
    import weakref

    alive = []

    def stream():
        for i in range(20):
            tensor = torch.full((64, 64), float(i))
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= 3  # a shard of two, and the one at hand

    write_shards(stream(), tmp_path, shard_bytes=2 * 64 * 64 * 4)
    assert len(read_all(tmp_path)) == 20


def test_another_save_leaves_nothing_of_the_earlier_one_and_no_bystander_goes(tmp_path):
    for name in ("model_best.safetensors", "notes.txt"):
        (tmp_path / name).write_text("mine")
    for limit in (1, 10**9, 128):
        write_shards(pairs(), tmp_path, shard_bytes=limit)
        (tmp_path / "model_best.safetensors").rename(tmp_path / "aside")
        assert len(read_all(tmp_path)) == 5
        (tmp_path / "aside").rename(tmp_path / "model_best.safetensors")
    assert (tmp_path / "model_best.safetensors").read_text() == "mine" and (tmp_path / "notes.txt").exists()


def breaks_off():
    yield from pairs(3, 7.0)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stream", "error"), [
    (breaks_off, KeyboardInterrupt), (lambda: iter(()), FileError),
    (lambda: [*pairs(2, 7.0), *pairs(1, 7.0)], FileError),
    (lambda: [("__metadata__", torch.ones(1))], FileError),
    (lambda: [("a", None)], FileError), (lambda: [(5, torch.ones(1))], FileError),
    (lambda: [("a", torch.eye(3).to_sparse())], FileError),
], ids=["interrupted", "empty", "twice", "reserved", "none", "no name", "sparse"])
@pytest.mark.parametrize("limit", [1, 10**9])
def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, stream, error, limit):
    write_shards(pairs(), tmp_path, shard_bytes=limit)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(error):
        write_shards(stream(), tmp_path, shard_bytes=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_something_in_the_way_leaves_the_earlier_save(tmp_path):
    write_shards(pairs(), tmp_path)
    (tmp_path / "model-00001-of-00005.safetensors").mkdir()
    with pytest.raises(FileError, match="is in the way: it is no file"):
        write_shards(pairs(5, 7.0), tmp_path, shard_bytes=1)
    (tmp_path / "model-00001-of-00005.safetensors").rmdir()
    assert all(torch.equal(read_all(tmp_path)[k], v) for k, v in pairs())
    with pytest.raises(FileError, match="cannot write"):
        write_shards(pairs(), tmp_path / "model.safetensors")


def test_views_of_one_storage_are_written_apart(tmp_path):
    whole = torch.arange(8.0).view(2, 4)
    write_shards([("a", whole), ("b", whole[1]), ("c", whole.T)], tmp_path)
    found = read_all(tmp_path)
    assert torch.equal(found["a"], whole) and torch.equal(found["b"], whole[1])
    assert torch.equal(found["c"], whole.T)


def test_a_bundle_with_a_checksum_that_fits_and_nothing_else_is_named(tmp_path):
    save_bundle(tmp_path / "b", {"a": torch.ones(2)}, {})
    from poise.files import _own_checksum

    index = json.loads((tmp_path / "b.json").read_text())
    body = {k: v for k, v in index.items() if k != "checksum"}
    for changed in ({k: v for k, v in body.items() if k != "version"}, {**body, "meta": [1]}):
        (tmp_path / "b.json").write_text(json.dumps({**changed, "checksum": _own_checksum(changed)}))
        with pytest.raises(FileError, match="is not a bundle of Poise"):
            load_bundle(tmp_path / "b")
