"""Adapter files: PEFT's directories both ways, its former BONE from golden files, `.pth`, LoRA."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from bone_forms import SHAPES, options, randn
from safetensors.torch import load_file, save_file
from torch import nn

from poise import save_adapter
from poise.errors import ConfigError, FileError
from poise.models.components import CausalLM
from poise_bone import Bone, export_lora, load_peft, read_adapter, save_peft
from poise_bone.functional import delta

peft = pytest.importorskip("peft")
GOLDEN = Path(__file__).parent / "golden"
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMS = {"bone": {}, "bat": {"init_weights": "bat"}, "mini": {"init_weights": "mini", "mini_r": 8}}


def network(i=24, o=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, i))


def attach(variant="bone", r=8, model=None, **more):
    attached = Bone(r=r, variant=variant, **more).attach(model or network())
    with torch.no_grad():
        for n, (_, D) in enumerate(attached.tensors()):
            D.copy_(0.3 * randn(*D.shape, seed=n))
    return attached


def x(i=24):
    return randn(6, i, seed=9, dtype=torch.float32)


# ------------------------------------------------------------------ PEFT's MISS


@pytest.mark.parametrize("r", [8, 5])
@pytest.mark.parametrize("variant", FORMS)
def test_peft_reads_what_is_written_and_computes_the_same(variant, r, tmp_path):
    if variant == "bat" and r == 5:
        pytest.skip("bat needs a divisor")
    attached = attach(variant, r, **({"mini_r": 8} if variant == "mini" else {}))
    save_peft(attached, tmp_path)
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path))
    assert theirs.peft_config["default"].peft_type == "MISS"
    assert torch.allclose(theirs(x()), attached.model(x()), atol=2e-6)
    merged = theirs.merge_and_unload()
    folded = attached.folded_state_dict()
    assert all(torch.allclose(merged.state_dict()[k], folded[k], atol=2e-6) for k in folded)


@pytest.mark.parametrize("r", [8, 5])
@pytest.mark.parametrize("variant", FORMS)
def test_what_peft_writes_is_read_and_computes_the_same(variant, r, tmp_path):
    if variant == "bat" and r == 5:
        pytest.skip("bat needs a divisor")
    config = peft.MissConfig(r=r, target_modules=["0", "2"], miss_dropout=0.25, **FORMS[variant])
    theirs = peft.get_peft_model(network(), config)
    for n, p in enumerate(q for name, q in theirs.named_parameters() if "miss_block" in name):
        p.data.copy_(0.3 * randn(*p.shape, seed=n))
    theirs.save_pretrained(str(tmp_path))
    model = network()
    attached = load_peft(model, tmp_path)
    assert attached.adapter.variant == variant and attached.adapter.dropout == 0.25
    assert torch.allclose(model.eval()(x()), theirs.eval()(x()), atol=2e-6)
    assert not torch.allclose(model(x()), network()(x()), atol=1e-2)  # it is not ignored
    save_peft(attached, tmp_path / "again")
    ours, original = load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / TENSORS)
    assert ours.keys() == original.keys() and all(torch.equal(ours[k], original[k]) for k in ours)


@pytest.mark.parametrize("variant", FORMS)
def test_it_trains_as_peft_does(variant):
    """The same five steps of SGD, from the same start."""
    config = peft.MissConfig(r=8, target_modules=["0", "2"], **FORMS[variant])
    theirs = peft.get_peft_model(network(), config)
    mine = Bone(r=8, variant=variant, **({"mini_r": 8} if variant == "mini" else {})).attach(network())
    pairs = [(theirs, torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.05)),
             (mine.model, mine.optimizer(torch.optim.SGD, lr=0.05))]
    losses = [[], []]
    for (model, optimizer), found in zip(pairs, losses, strict=True):
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_a_language_model_goes_to_peft_and_back(tmp_path):
    torch.manual_seed(0)
    make = CausalLM(architecture="LlamaForCausalLM", hidden_size=16).build
    torch.manual_seed(0)
    model = make().eval()
    attached = attach("bat", 4, copy.deepcopy(model), target_modules=["q_proj", "down_proj"])
    save_peft(attached, tmp_path)
    ids = torch.tensor([[1, 2, 3, 200, 17, 5]])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    back = copy.deepcopy(model)
    load_peft(back, tmp_path)
    with torch.no_grad():
        want = attached.model(input_ids=ids).logits
        assert torch.allclose(theirs(input_ids=ids).logits, want, atol=1e-5)
        assert torch.equal(back(input_ids=ids).logits, want)
        assert not torch.allclose(model(input_ids=ids).logits, want, atol=1e-3)


def test_fields_that_say_nothing_here_are_kept(tmp_path):
    save_peft(attach(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    more = {"task_type": "CAUSAL_LM", "revision": "v2", "later": [1, 2]}
    (tmp_path / CONFIG).write_text(json.dumps({**config, **more}))
    attached = load_peft(network(), tmp_path)
    save_peft(attached, tmp_path / "again")
    kept = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert (kept["task_type"], kept["revision"], kept["later"]) == ("CAUSAL_LM", "v2", [1, 2])


def test_a_scale_is_folded_into_what_is_written(tmp_path):
    attached = attach(scale=0.5)
    save_peft(attached, tmp_path)
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path))
    assert torch.allclose(theirs(x()), attached.model(x()), atol=2e-6)
    loaded = load_peft(network(), tmp_path)
    assert loaded.adapter.scale == 1.0 and torch.allclose(loaded.model(x()), attached.model(x()), atol=2e-6)


# ------------------------------------------------------------------ PEFT's former BONE


@pytest.mark.parametrize("case", ["bone", "uneven", "bat"])
def test_the_bone_of_peft_0_15_is_read_and_computes_the_same(case):
    given = load_file(GOLDEN / case / "case.safetensors")
    model = nn.Sequential(nn.Linear(8, 12))
    model[0].load_state_dict({"weight": given["weight"], "bias": given["bias"]})
    with pytest.warns(UserWarning, match="peft_type BONE, which PEFT reads no more: read as MISS"):
        attached = load_peft(model, GOLDEN / case)
    assert attached.adapter.variant == ("bat" if case == "bat" else "bone")
    assert torch.allclose(model(given["x"]), given["y"], atol=1e-6)
    attached.fold()
    assert torch.allclose(model[0].base.weight, given["merged"], atol=1e-6)


@pytest.mark.parametrize("case", ["bone", "bat"])
def test_bone_is_written_as_peft_0_15_wrote_it(case, tmp_path):
    model = nn.Sequential(nn.Linear(8, 12))
    with pytest.warns(UserWarning, match="BONE"):
        attached = load_peft(model, GOLDEN / case)
    save_peft(attached, tmp_path, "BONE")
    ours, theirs = (load_file(folder / TENSORS) for folder in (tmp_path, GOLDEN / case))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert json.loads((tmp_path / CONFIG).read_text()) == json.loads((GOLDEN / case / CONFIG).read_text())
    save_peft(attached, tmp_path / "miss")  # and so it comes to the PEFT of today
    plain = nn.Sequential(copy.deepcopy(model[0].base))
    again = peft.PeftModel.from_pretrained(plain, str(tmp_path / "miss"))
    assert torch.allclose(again(x(8)), model(x(8)), atol=1e-6)


# ------------------------------------------------------------------ pth


def save_pth(path, key, blocks):
    torch.save({f"{name}.{key}": block for name, block in blocks.items()}, path)
    return path


def test_three_dimensional_blocks_of_rwkv_peft_are_the_row_form(tmp_path):
    attached = attach("bat_row")
    blocks = {n: layer.block().detach() for n, layer in attached.layers.items()}
    saved = read_adapter(save_pth(tmp_path / "rwkv-0.pth", "disha", blocks))
    assert saved.variant == "bat_row"
    model = network()
    saved.attach(model)
    assert torch.equal(model(x()), attached.model(x()))


def test_two_dimensional_blocks_are_bone_flat_ones_bat(tmp_path):
    bone, bat = attach("bone"), attach("bat")
    for attached, flat in ((bone, lambda b: b), (bat, lambda b: b.flatten(0, 1))):
        blocks = {n: flat(layer.block().detach()) for n, layer in attached.layers.items()}
        saved = read_adapter(save_pth(tmp_path / "demo.pth", "bone", blocks))
        assert saved.variant == attached.adapter.variant
        model = network()
        saved.attach(model)
        assert torch.equal(model(x()), attached.model(x()))


def test_what_a_pth_file_does_not_say_is_asked_for(tmp_path):
    three = save_pth(tmp_path / "3.pth", "bone", {"0": randn(2, 8, 8)})
    with pytest.raises(FileError, match="say variant='bat' or variant='bat_row'"):
        read_adapter(three)
    assert {v: read_adapter(three, v).variant for v in ("bat", "bat_row", "bat_left")} == {
        "bat": "bat", "bat_row": "bat_row", "bat_left": "bat_left"}
    square = save_pth(tmp_path / "2.pth", "bone", {"0": randn(8, 8)})
    with pytest.raises(FileError, match=r"8 x 8, which may be \(r, outputs\) or \(outputs, r\): say "
                                        r"variant="):
        read_adapter(square)
    assert read_adapter(square, "bat").blocks["0"].shape == (1, 8, 8)
    assert read_adapter(square, "bone").blocks["0"].shape == (8, 8)
    odd = save_pth(tmp_path / "odd.pth", "bone", {"0": randn(8, 6), "1": randn(7, 5)})
    with pytest.raises(FileError, match="neither one number of rows nor one of columns"):
        read_adapter(odd)


def test_a_square_layer_read_in_the_wrong_orientation_is_refused_or_asked_for(tmp_path):
    """Shapes agree when a layer is square: only the file's field or the argument can tell."""
    model = nn.Sequential(nn.Linear(16, 16))
    attached = attach("bat_row", 4, copy.deepcopy(model))
    path = save_pth(tmp_path / "a.pth", "bone", {"0": attached.layers["0"].block().detach()})
    outputs = {}
    for variant in ("bat", "bat_row"):
        other = copy.deepcopy(model)
        read_adapter(path, variant).attach(other)
        outputs[variant] = other(x(16))
    assert torch.equal(outputs["bat_row"], attached.model(x(16)))
    assert not torch.allclose(outputs["bat"], outputs["bat_row"], atol=1e-2)
    with pytest.raises(FileError):
        read_adapter(path)


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/poise-pickle-was-run"),))


def test_a_pickle_of_code_is_never_run(tmp_path):
    makes = (lambda f: torch.save({"0.disha": _Bomb()}, f), lambda f: pickle.dump(_Bomb(), f, 2))
    for k, make in enumerate(makes):
        path = tmp_path / f"{k}.pth"
        with path.open("wb") as f:
            make(f)
        with pytest.raises(FileError, match="never run"):
            read_adapter(path)
    assert not Path("/tmp/poise-pickle-was-run").exists()


@pytest.mark.parametrize(("content", "words"), [
    ({"0.weight": torch.zeros(2, 2)}, "has no keys NAME.disha or NAME.bone"),
    ({"0.bone": torch.zeros(2, 2), "1.disha": torch.zeros(2, 2)}, "or both"),
    ({"0.disha": torch.zeros(2, 3), "head.weight": torch.zeros(2)}, "holds more than blocks"),
    ({"0.disha": torch.zeros(2, 3, 4)}, r"is \(2, 3, 4\), not \(n, r, r\)"),
    ({"0.disha": torch.zeros(2)}, "have \\[1\\] dimensions"),
    ({"0.disha": torch.full((2, 3), torch.nan)}, "not finite"),
    ({"0.disha": torch.zeros(2, 3, dtype=torch.int64)}, "is no plain tensor of type fp16"),
    ([torch.zeros(2)], "no mapping of names to tensors"),
])
def test_other_pth_files_are_refused_in_words(content, words, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(FileError, match=words):
        read_adapter(tmp_path / "a.pth")


# ------------------------------------------------------------------ LoRA


@pytest.mark.parametrize(
    ("variant", "r"), [("bone", 8), ("bone", 5), ("mini", 8), ("bone_out", 8), ("bone_out", 5)])
def test_an_added_form_becomes_a_lora_that_peft_serves_exactly(variant, r, tmp_path):
    attached = attach(variant, r, **({"mini_r": 8} if variant == "mini" else {}))
    assert set(export_lora(attached, tmp_path).values()) == {0.0}
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path))
    assert theirs.peft_config["default"].peft_type == "LORA"
    assert torch.allclose(theirs(x()), attached.model(x()), atol=2e-6)


def test_ranks_that_differ_are_written_for_each_layer(tmp_path):
    attached = attach("bone", 8, rank_pattern={"2": 5})
    export_lora(attached, tmp_path)
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path))
    assert torch.allclose(theirs(x()), attached.model(x()), atol=2e-6)


@pytest.mark.parametrize("variant", ["bat", "bat_row", "bat_left"])
def test_a_guided_form_becomes_a_lora_with_the_error_that_is_returned(variant, tmp_path):
    attached = attach(variant)
    with pytest.raises(ConfigError, match="has full rank: give the rank"):
        export_lora(attached, tmp_path)
    errors = export_lora(attached, tmp_path, rank=6)
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path)).merge_and_unload()
    for name, error in errors.items():
        W = attached.layers[name].beneath()
        want = delta(W, attached.layers[name].block().detach(), variant)
        got = theirs.state_dict()[f"{name}.weight"] - W
        assert 0 < error < 1 and float((got - want).norm() / want.norm()) == pytest.approx(error, abs=1e-4)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(("variant", "peft_type", "words"), [
    ("bat_row", "MISS", r"no form for variant=bat_row: poise\.save_adapter"),
    ("bat_left", "MISS", "no form for variant=bat_left"), ("bone_out", "MISS", "export_lora writes it as a "
                                                                               "LoRA"),
    ("bone_free", "MISS", "no form for variant=bone_free"), ("mini", "BONE", "BONE of PEFT has no form for "
                                                                             "variant=mini"),
    ("bone", "LORA", "peft_type='LORA' is not allowed"),
])
def test_what_peft_has_no_form_for_is_not_written(variant, peft_type, words, tmp_path):
    attached = Bone(**options(variant, SHAPES[variant])).attach(nn.Sequential(nn.Linear(24, 16)))
    with pytest.raises(ConfigError, match=words):
        save_peft(attached, tmp_path, peft_type)
    assert not list(tmp_path.iterdir())


def test_layers_that_peft_does_not_adapt_are_not_written(tmp_path):
    torch.manual_seed(0)
    gpt2 = CausalLM(architecture="GPT2LMHeadModel", hidden_size=16, layers=1).build()
    with pytest.raises(ConfigError, match="is a Conv1D, which PEFT's type does not adapt"):
        save_peft(Bone(r=4).attach(gpt2), tmp_path)
    conv = Bone(r=2, target_modules=["0"]).attach(nn.Sequential(nn.Conv2d(4, 4, 3)))
    with pytest.raises(ConfigError, match="is a conv, which PEFT's type does not adapt"):
        save_peft(conv, tmp_path)
    with pytest.raises(ConfigError, match="one r for all layers"):
        save_peft(attach(rank_pattern={"2": 4}), tmp_path)


def damaged(folder, *, config=None, tensors=None, cut=None):
    """Change a saved directory."""
    if config:
        now = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**now, **config}))
    if tensors:
        now = load_file(folder / TENSORS)
        tensors(now)
        save_file(now, folder / TENSORS)
    if cut:
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:cut])


def rename(old, new):
    return lambda t: t.__setitem__(f"base_model.model.{new}", t.pop(f"base_model.model.{old}"))


def put(key, shape):
    return lambda t: t.__setitem__(f"base_model.model.{key}.miss_block", torch.ones(shape))


@pytest.mark.parametrize(("damage", "words"), [
    ({"tensors": put("0", (8, 15))}, r"0.D has shape \(8, 15\), here \(8, 16\)"),
    ({"tensors": put("0", (16, 8))}, r"has shape \(16, 8\); r=8 and init_weights=True need \(8, outputs\)"),
    ({"tensors": put("0", (2, 8, 8))}, r"has shape \(2, 8, 8\); r=8"),
    ({"config": {"init_weights": "bat"}}, r"need \(outputs / 8, 8, 8\)"),
    ({"config": {"init_weights": "mini", "mini_r": 4}}, "columns, mini_r is 4"),
    ({"config": {"init_weights": "pissa"}}, "init_weights='pissa' is not known"),
    ({"config": {"r": 4}}, "r=4"), ({"config": {"r": "8"}}, "r='8' is no number"),
    ({"config": {"peft_type": "LORA"}}, "is of peft_type 'LORA': MISS and BONE are read"),
    ({"config": {"bias": "all"}}, "bias='all' is not read here"),
    ({"config": {"modules_to_save": ["2"]}}, r"modules_to_save=\['2'\] is not read here"),
    ({"config": {"peft_type": "BONE"}}, "0.miss_block is no block of BONE"),
    ({"tensors": put("3", (8, 16))}, "1 layers that this model has not, 3 first"),
    ({"tensors": lambda t: t.pop("base_model.model.2.miss_block")}, r"configuration means 2, and there is "
                                                                    r"no block for that"),
    ({"tensors": lambda t: t.clear()}, "holds no tensor"), ({"cut": 100}, "torn or altered"),
    ({"tensors": rename("2.miss_block", "2.lora_A.weight")}, "is no block of MISS"),
])
def test_a_directory_that_is_not_right_is_refused_and_the_model_left_alone(damage, words, tmp_path):
    save_peft(attach(), tmp_path)
    damaged(tmp_path, **damage)
    model = network()
    with pytest.raises(FileError, match=words):
        load_peft(model, tmp_path)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


def test_a_directory_without_its_files_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"cannot read .*nowhere"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(FileError, match="is no adapter: it has neither"):
        read_adapter(tmp_path)
    save_peft(attach(), tmp_path)
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileError, match=r"missing; adapter_model\.bin is a pickle: save the adapter again"):
        load_peft(network(), tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(FileError, match="is not valid JSON"):
        load_peft(network(), tmp_path)
    with pytest.raises(ConfigError, match="variant='left' is not allowed"):
        read_adapter(tmp_path, "left")


def test_blocks_of_zeros_are_pointed_out(tmp_path):
    save_peft(Bone(r=8).attach(network()), tmp_path)
    with pytest.warns(UserWarning, match="holds blocks of zeros only: the adapter changes nothing"):
        load_peft(network(), tmp_path)


def test_poises_own_directories_are_read_too(tmp_path):
    attached = attach("bat_row")
    save_adapter(attached, tmp_path)
    saved = read_adapter(tmp_path)
    assert saved.variant == "bat_row" and saved.source == "poise"
    model = network()
    saved.attach(model)
    assert torch.equal(model(x()), attached.model(x()))
    with pytest.raises(FileError, match="holds bat_row, not bat"):
        read_adapter(tmp_path, "bat")
    with pytest.raises(FileError, match="is no directory of PEFT"):
        load_peft(network(), tmp_path)
