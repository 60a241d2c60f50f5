"""Experts in a kernel's own order: the same model, opened only where the order is known."""

from __future__ import annotations

import json

import pytest
import torch
from loads import absent
from moe_models import ids, saved
from test_fast import decoded, opened

from poise.errors import ConfigError, FileError
from poise.quantizers import ggml
from poise.quantizers.orders import GGML_TAG, torch_tag
from poise_edgemoe import Engine, convert
from poise_edgemoe.components import EdgeMoEStore
from poise_edgemoe.store.index import INDEX, _own, read_index
from poise_edgemoe.store.inspecting import table


def source_of(tmp_path, **config):
    wide = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
    return saved(tmp_path / "model", "olmoe", torch.float32, **wide | config)


def tags(store):
    return [q.get("layout") for q in read_index(store).quantizers]


def altered(store, change):
    """Write an index that says something else, its checksum included."""
    said = json.loads((store / INDEX).read_text())
    change(said)
    said["checksum"] = _own({k: v for k, v in said.items() if k != "checksum"})
    (store / INDEX).write_text(json.dumps(said))


@pytest.mark.parametrize(("scheme", "layout"), [
    ("q4_0", "ggml"), ("asym_group", "torch"), ("sym_group", "torch")])
def test_an_order_changes_no_value(scheme, layout, tmp_path):
    source, found = source_of(tmp_path), {}
    for name in ("plain", layout):
        store = convert(source, tmp_path / name, scheme=scheme, hot="raw", layout=name)
        with opened(store, 2, kernel="reference") as engine:
            found[name] = decoded(engine), engine.logits(ids(2))
    assert all(torch.equal(a, b) for a, b in zip(*found.values()))
    plain, other = ((tmp_path / n / "experts.bin").read_bytes() for n in found)
    assert tags(tmp_path / "plain") == [None] and tags(tmp_path / layout) == [
        GGML_TAG if layout == "ggml" else torch_tag()]
    assert len(plain) == len(other) and plain != other
    assert tags(tmp_path / layout)[0] in table(tmp_path / layout)


@pytest.mark.parametrize(("scheme", "layout"), [("q4_0", "ggml"), ("asym_group", "torch")])
def test_its_kernel_reads_it_as_it_lies_at_every_size_of_the_cache(scheme, layout, tmp_path):
    if layout == "ggml" and ggml.kernel() is None:
        pytest.skip(ggml.status())
    store, found = convert(source_of(tmp_path), tmp_path / "s", scheme=scheme, hot="raw", layout=layout), []
    for experts in (1, 3, None):
        with opened(store, experts) as engine:
            assert engine.cache.forms.fast and not engine.cache.forms.slow
            found.append((decoded(engine), decoded(engine, 3)))
            assert torch.equal(decoded(engine), found[-1][0])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    with opened(store, 2, kernel=layout) as named, opened(store, 2, kernel="reference") as exact:
        assert torch.equal(decoded(named), found[0][0])
        a, b = found[0][0][:, :1], decoded(exact, new=1)
        assert 0 < (a - b).abs().mean() < 2e-2 * b.abs().mean()


def test_auto_interleaves_q4_0_where_the_kernel_is_and_nothing_else(tmp_path, monkeypatch):
    source = source_of(tmp_path)
    assert tags(convert(source, tmp_path / "codes", hot="raw")) == [None]
    assert tags(convert(source, tmp_path / "q8", scheme="q8_0", hot="raw")) == [None]
    if ggml.kernel() is not None:
        assert tags(convert(source, tmp_path / "q4", scheme="q4_0", hot="raw")) == [GGML_TAG]
    monkeypatch.setattr(ggml, "_KERNEL", absent("of a test"))
    store = convert(source, tmp_path / "none", scheme="q4_0", hot="raw")
    assert tags(store) == [None]
    mixed = convert(source, tmp_path / "mixed", scheme="q4_0", plan={"*.0.*": 16}, hot="raw", layout="ggml")
    assert sorted(tags(mixed), key=str) == [None, GGML_TAG]
    with pytest.warns(UserWarning, match="no ggml kernel: of a test"), Engine.open(mixed) as engine:
        assert engine.logits(ids(1)).isfinite().all()


def test_orders_of_other_machines_and_none_at_all(tmp_path):
    store = convert(source_of(tmp_path), tmp_path / "s", hot="raw", layout="torch")
    other = "torch:sve256:0badc0de"
    altered(store, lambda said: said["quantizers"][0].update(layout=other))
    told = (f"lie in the order {other}, and this machine's is {torch_tag()}: convert the model again here; "
            "layout=plain is read on every machine")
    with pytest.raises(FileError, match=told):
        Engine.open(store)
    for tag, said in (("ggml:q9", "it is not known here"), (7, "names no layout: 7"),
                      (GGML_TAG, "interleaves blocks of q4_0")):
        altered(store, lambda said, tag=tag: said["quantizers"][0].update(layout=tag))
        with pytest.raises(FileError, match=said):
            Engine.open(store)


@pytest.mark.parametrize(("given", "said"), [
    ({"layout": "gguf"}, "layout='gguf' is not allowed: it must be one of auto, plain, ggml, torch"),
    ({"layout": "ggml"}, r"experts.0.\w+: layout=ggml does not take this matrix"),
    ({"layout": "ggml", "scheme": "q8_0"}, "layout=ggml does not take this matrix"),
    ({"layout": "torch", "bits": 8}, "layout=torch does not take .*: torch multiplies matrices of 4 bits"),
    ({"layout": "torch", "scheme": "sym_channel"}, "in groups of 32, 64, 128 or 256 columns"),
])
def test_layouts_that_cannot_be_are_refused_before_anything_is_written(given, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        convert(source_of(tmp_path), tmp_path / "no", hot="raw", **given)
    assert not list(tmp_path.glob("no*"))


def test_a_layout_of_what_is_not_packed_is_refused():
    with pytest.raises(ConfigError, match="layout=torch has no effect: 16 and 32 bits are not quantized"):
        EdgeMoEStore(bits=32, layout="torch")
    with pytest.raises(ConfigError, match="layout=plain has no effect beside store="):
        EdgeMoEStore(store="somewhere", layout="plain")


def test_from_the_command_line(tmp_path, capsys):
    from poise.cli.main import main

    source, store = str(source_of(tmp_path)), str(tmp_path / "s")
    given = ("moe", "convert", source)
    assert main([*given, store, "--scheme", "q4_0", "--hot", "q8_0", "--layout", "ggml"]) == 0
    assert tags(tmp_path / "s") == [GGML_TAG]
    assert read_index(store).hot["quantizer"] == {"entry": "q8_0"}
    assert main([*given, str(tmp_path / "no"), "--scheme", "q4_0", "--bits", "8"]) == 2
    assert "bits=8 is not allowed: q4_0 has 4 bits" in capsys.readouterr().err
    assert main(["moe", "inspect", store]) == 0
    assert f"4 bits, q4_0, {GGML_TAG}" in capsys.readouterr().out
