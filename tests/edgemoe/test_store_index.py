"""A store that was changed, its checksums made again, is refused in words: never is it read as another."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from moe_models import FAMILIES, saved

from poise.errors import FileError
from poise.files import checksum
from poise.testing.families import tiny
from poise_edgemoe.engine import Engine
from poise_edgemoe.store.index import EXPERTS, INDEX, read_index
from poise_edgemoe.store.inspecting import table
from poise_edgemoe.store.writer import convert


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return convert(saved(folder / "model"), folder / "store", bits=4, group=8)


@pytest.fixture
def copy(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store"


def altered(path, change):
    """Rewrite an index with another content and the right checksum."""
    from poise_edgemoe.store.index import _own

    said = json.loads(path.read_text())
    change(said)
    said["checksum"] = _own({k: v for k, v in said.items() if k != "checksum"})
    path.write_text(json.dumps(said))


def layer(said, n=0):
    """Return a layer of an index."""
    return said["layers"][n]


def down(said):
    """Return what an index says of one matrix."""
    return layer(said)["experts"][1]["down"]


def files(said, name=EXPERTS):
    """Return what an index says of a file."""
    return said["files"][name]


def reorder(said):
    """Let two layers change places, each with the bytes of the other."""
    first, second = said["layers"]
    first["path"], second["path"] = second["path"], first["path"]


def fewer(said):
    """Let the last expert be gone, and the bytes of it."""
    gone = layer(said, 1)["experts"].pop()
    size = sum(-(-m["nbytes"] // 4096) * 4096 for m in gone.values())
    files(said)["bytes"] -= size


NONE = "is no index of a store"


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s.update(version=3), "has version 3; this Poise reads 1 and 2"),
    (lambda s: s.update(version="1"), "has version '1'; this Poise reads 1"),
    (lambda s: s.update(version=True), "has version True; this Poise reads 1"),
    (lambda s: s.update(version=1.0), r"has version 1\.0; this Poise reads 1"),
    (lambda s: s.update(kind="other"), NONE),
    (lambda s: s.update(more=1), f"{NONE}: it has an unknown 'more'"),
    (lambda s: s.pop("layers"), f"{NONE}: it lacks 'layers'"),
    (lambda s: s.update(layers=[]), f"{NONE}: it has no layers"),
    (lambda s: s.update(layers={}), f"{NONE}: 'layers' of it is {{}}, not of the type list"),
    (lambda s: s.update(family=3), f"{NONE}: 'family' of it is 3, not of the type str"),
    (lambda s: s.update(family="olmoe"), "the family 'olmoe', config.json of 'mixtral'"),
    (lambda s: s.update(dtype="int8"), "the type 'int8' is not known"),
    (lambda s: s.update(hot=[]), f"{NONE}: 'hot' of it is"),
    (lambda s: s.update(hot={"packed": []}), f"{NONE}: 'hot' lacks 'quantizer'"),
    (lambda s: s.update(quantizers=[3]), f"{NONE}: 'quantizers' holds 3"),
    (lambda s: s["quantizers"][0].update(entry="gone"), "no quantizer named 'gone'"),
    (lambda s: s.update(files={}), "'files' lacks 'experts.bin'"),
    (lambda s: s["files"].pop(EXPERTS), "'files' lacks 'experts.bin'"),
    (lambda s: s["files"].pop("config.json"), "'files' lacks 'config.json'"),
    (lambda s: s["files"].update({"../x": {"bytes": 1}}), "only files beside it are read"),
    (lambda s: s["files"].update({"": {"bytes": 1}}), "only files beside it are read"),
    (lambda s: s["files"].update({"a\0b": {"bytes": 1}}), "only files beside it are read"),
    (lambda s: s["files"].update({"..": {"bytes": 1}}), "only files beside it are read"),
    (lambda s: s["files"].update({"config.json": 3}), "file config.json is 3, not an object"),
    (lambda s: files(s).pop("bytes"), "file experts.bin lacks 'bytes'"),
    (lambda s: files(s, "config.json").pop("sha256"), "file config.json lacks 'sha256'"),
    (lambda s: files(s, "config.json").update(sha256=3), "'sha256' of file config.json is 3"),
    (lambda s: files(s, "hot.safetensors").update(sha256="0"), "'sha256' of file hot.safetensors is '0'"),
    (lambda s: files(s).update(bytes="9"), "'bytes' of file experts.bin is '9'"),
    (lambda s: layer(s).pop("path"), f"{NONE}: a layer lacks 'path'"),
    (lambda s: layer(s).update(experts=[]), "has no experts"),
    (lambda s: layer(s).update(experts=[3]), "'experts' of layer .* holds 3"),
    (lambda s: layer(s).update(biased=["up"]), "has biases of parts that it does not have"),
    (lambda s: layer(s).update(biased=[[]]), r"'biased' of layer .* holds \[\]"),
    (lambda s: layer(s).update(transposed=0), "'transposed' of a layer is 0, not of the type bool"),
    (lambda s: layer(s)["shapes"].update(down=[16, True]), "a part 'down' of shape"),
    (lambda s: layer(s)["shapes"].update(down=[16, 0]), "a part 'down' of shape"),
    (lambda s: layer(s)["shapes"].update(down=16), "a part 'down' of shape 16"),
    (lambda s: layer(s)["shapes"].update(up=[16, 24]), "a part 'up' of shape"),
    (lambda s: layer(s)["shapes"].pop("down"), "expert 0 in layer 0 lacks a part, or has one too many"),
    (lambda s: layer(s)["experts"][1].pop("down"), "expert 1 in layer 0 lacks a part"),
    (lambda s: layer(s)["experts"][1].update(down=3), "down of expert 1 in layer .* is 3, not an object"),
    (lambda s: down(s).update(offset=4097), "down of expert 1 in layer 0 does not begin at"),
    (lambda s: down(s).update(offset=0), "does not begin at"),
    (lambda s: down(s).update(offset=0.0), r"'offset' of down of expert 1 .* is 0\.0, not"),
    (lambda s: down(s).update(nbytes="9"), "'nbytes' of down of expert 1 .* is '9', not of the type int"),
    (lambda s: down(s).update(nbytes=0), "does not begin at"),
    (lambda s: down(s).update(form=False), "'form' of down of expert 1 .* is False, not of the type int"),
    (lambda s: down(s).update(form=7), "in no form that the index knows"),
    (lambda s: down(s).update(form=-1), "in no form that the index knows"),
    (lambda s: s["layers"].pop(), "the experts end at"),
    (lambda s: s["layers"].pop(0), "does not begin at 0"),
    (lambda s: layer(s, 1)["experts"].pop(), "the experts end at"),
])
def test_an_index_that_says_what_cannot_be_is_refused(change, words, copy):
    altered(copy / INDEX, change)
    with pytest.raises(FileError, match=words):
        read_index(copy)
    with pytest.raises(FileError, match=words):
        Engine.open(copy)


@pytest.mark.parametrize(("change", "words"), [
    (reorder, r"has experts in model.layers.1.mlp.experts, model.layers.0.mlp.experts, the"),
    (lambda s: layer(s).update(path="model.gone"), r"has experts in model.gone, model.layers.1"),
    (lambda s: layer(s).update(transposed=True), r"transposed=True of model.layers.0.mlp.experts"),
    (lambda s: layer(s).update(encoder=True), r"encoder=True of model.layers.0.mlp.experts"),
    (lambda s: layer(s).update(biased=["down"]), r"biased=\['down'\] of model.layers.0.mlp.experts"),
    (lambda s: layer(s)["shapes"]["down"].reverse(), r"shapes=.* of model.layers.0.mlp.experts"),
    (lambda s: layer(s)["shapes"].update(gate_up=[24, 32]), r"shapes=.* of model.layers.0.mlp.experts"),
    (lambda s: s.update(dtype="float16"), r"says dtype=float16, and .* is bfloat16"),
    (lambda s: s["files"].pop("hot.safetensors"), "is missing"),
    (lambda s: s["quantizers"][0].update(bits=8), "cannot have .* bytes in its form"),
    (fewer, r"experts=3 of model.layers.1.mlp.experts, the model of config.json has 4"),
])
def test_an_index_of_another_model_is_refused_when_an_engine_opens(change, words, copy):
    altered(copy / INDEX, change)
    with open(copy / EXPERTS, "r+b") as f:
        f.truncate(json.loads((copy / INDEX).read_text())["files"][EXPERTS]["bytes"])
    with pytest.raises(FileError, match=words):
        Engine.open(copy)


def configured(store, **options):
    """Change a store's configuration, and what its index says of that file."""
    said = json.loads((store / "config.json").read_text())
    (store / "config.json").write_text(json.dumps({**said, **options}))
    altered(store / INDEX, lambda s: s["files"].update({"config.json": facts(store / "config.json")}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_other_sizes_is_refused_when_an_engine_opens(family, tmp_path):
    widths = ("d_ff", "moe_intermediate_size", "intermediate_size")
    store = convert(tiny(family), tmp_path / "store", bits=32)
    said = json.loads((store / "config.json").read_text())
    configured(store, **{next(w for w in widths if w in said): 32})
    with pytest.raises(FileError, match=r"the index says shapes=.*, the model of config.json has"):
        Engine.open(store)


def test_a_configuration_of_another_family_or_vocabulary_is_refused(copy):
    configured(copy, vocab_size=300)
    with pytest.raises(FileError, match=r"size mismatch for .*257, 16"):
        Engine.open(copy)
    configured(copy, model_type="vit")
    with pytest.raises(FileError, match=r"the family 'mixtral', config.json of 'vit'"):
        Engine.open(copy)
    altered(copy / INDEX, lambda s: s.update(family="vit"))
    with pytest.raises(FileError, match=r"both must be one of mixtral, olmoe"):
        Engine.open(copy)


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s["hot"]["packed"].append("model.gone"), "model.gone is not of this model"),
    (lambda s: s["hot"]["packed"].pop(), "is not of this model|is missing"),
    (lambda s: s.update(hot={}), "is not of this model|is missing"),
    (lambda s: s["hot"]["quantizer"].update(bits=8), "is not packed as the index says"),
    (lambda s: s["hot"].update(packed=[3]), "'packed' of 'hot' holds 3"),
    (lambda s: s["hot"].update(quantizer={"entry": "gone"}), "no quantizer named 'gone'"),
])
def test_packed_hot_weights_that_are_not_as_the_index_says_are_refused(change, words, tmp_path):
    store = convert(tiny("mixtral"), tmp_path / "store", hot=4)
    altered(store / INDEX, change)
    with pytest.raises(FileError, match=words):
        Engine.open(store)


def facts(path):
    """Return what an index says of a file as it is now."""
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def test_a_generation_configuration_that_the_index_does_not_name_is_not_read(copy):
    before = json.loads((copy / "config.json").read_text())["eos_token_id"]
    (copy / "generation_config.json").unlink(missing_ok=True)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 77}))
    altered(copy / INDEX, lambda s: s["files"].pop("generation_config.json", None))
    with Engine.open(copy) as engine:
        assert engine.source.end == (before,)
    listed = facts(copy / "generation_config.json")
    altered(copy / INDEX, lambda s: s["files"].update({"generation_config.json": listed}))
    with Engine.open(copy) as engine:
        assert engine.source.end == (77,)
    (copy / "generation_config.json").write_text("[]")
    listed = facts(copy / "generation_config.json")
    altered(copy / INDEX, lambda s: s["files"].update({"generation_config.json": listed}))
    with pytest.raises(FileError, match=r"generation_config.json is not read by transformers"):
        Engine.open(copy)


@pytest.mark.parametrize(("family", "words"), [
    ("mixtral", "2 layers of 4 experts, computed in bfloat16"),
    ("switch_transformers", "3 layers of 3 experts, computed in bfloat16"),
])
def test_inspecting_says_how_many_experts_there_are_once(family, words, tmp_path):
    said = table(convert(tiny(family), tmp_path / "store", group=8, plan={"experts.0.*": 16}))
    assert words in said and "16 bits, raw" in said and "4 bits, affine, group 8" in said


def gone(path, real):
    """Leave nothing in the place of a file."""


def pipe(path, real):
    os.mkfifo(path)


def folder(path, real):
    path.mkdir()


def link(path, real):
    path.symlink_to(real)


@pytest.mark.parametrize("put", [gone, pipe, folder, link])
def test_files_that_are_no_files_are_refused(put, copy, store):
    names = sorted(p.name for p in store.iterdir())
    assert {EXPERTS, INDEX, "hot.safetensors", "config.json", "poise_tokenizer.json"} <= {*names}
    for name in names:
        (copy / name).unlink()
        put(copy / name, store / name)
        words = f"has no {INDEX}" if name == INDEX else f"{name} is missing, or no regular file"
        with pytest.raises(FileError, match=words):
            read_index(copy)
        if put is folder:
            (copy / name).rmdir()
        else:
            (copy / name).unlink(missing_ok=True)
        shutil.copyfile(store / name, copy / name)
