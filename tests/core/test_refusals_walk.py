"""Guards of the files and of the walk that no other test meets: each is reached by what it is there for."""

from __future__ import annotations

import pytest
import torch
from refusal import Around
from torch import nn
from torch.nn.utils import parametrize

import poise.files
from poise.errors import ConfigError, FileError
from poise.files import load_arrays, load_bundle, save_bundle, write_shards
from poise.testing.adapter import small_model
from poise.testing.lowrank import LowRank
from poise.walk import Product, open_weights, replace_module, select, weights


def test_a_whole_bundle_of_something_else_is_named(tmp_path):
    poise.files._write_bundle(tmp_path / "it", b"no tensors", {})  # with checksums that fit
    with pytest.raises(FileError, match=r"it\.safetensors holds no tensors: "):
        load_bundle(tmp_path / "it")
    with pytest.raises(FileError, match=r"it\.safetensors holds no arrays of NumPy: "):
        load_arrays(tmp_path / "it")
    save_bundle(tmp_path / "it", {"w": torch.ones(2, dtype=torch.bfloat16)}, {})
    with pytest.raises(FileError, match=r"it\.safetensors holds no arrays of NumPy: "):
        load_arrays(tmp_path / "it")


@pytest.mark.parametrize("before", [0, 1, 3])
def test_shards_whose_index_cannot_be_written_leave_what_was_there(before, tmp_path, monkeypatch):
    def tensors(n, value):
        return ((str(i), torch.full((4,), value)) for i in range(n))

    if before:
        write_shards(tensors(before, 1.0), tmp_path, shard_bytes=16)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(poise.files, "write_json", full)
    with pytest.raises(FileError, match="No space left on device"):
        write_shards(tensors(2, 2.0), tmp_path, shard_bytes=16)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_an_empty_list_of_patterns_names_nothing():
    for what, patterns in (("included", {"include": []}), ("excluded", {"exclude": []})):
        with pytest.raises(ConfigError, match=f"an empty list of {what} patterns names no weight"):
            select(small_model(), **patterns)


def test_the_model_itself_is_replaced_by_nothing():
    with pytest.raises(ConfigError, match=r"the model itself is the layer \(Linear\): wrap it"):
        replace_module(nn.Linear(2, 2), "", nn.Linear(2, 2))


def directory(tmp_path, tensors, config="{}"):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    return tmp_path


def test_halves_of_an_expert_that_do_not_stack_are_named(tmp_path):
    prefix = "model.layers.0.block_sparse_moe.experts.0"
    path = directory(tmp_path, {f"{prefix}.w1.weight": torch.ones(4, 8), f"{prefix}.w3.weight":
                                torch.ones(4, 6), f"{prefix}.w2.weight": torch.ones(8, 4)},
                     '{"model_type": "mixtral"}')
    with pytest.raises(FileError, match=r"w1\.weight, .*w3\.weight do not stack: "):
        list(open_weights(path))


def test_a_weight_of_a_type_that_no_model_computes_with_is_named(tmp_path):
    path = directory(tmp_path, {"a.weight": torch.ones(2, 4, dtype=torch.int8)})
    with pytest.raises(FileError, match=r"a\.weight is of type I8: weights are read in F64, F32, F16 and"):
        list(open_weights(path))


def test_a_tensor_of_whole_numbers_stays_what_it_is_when_the_configuration_names_a_type(tmp_path):
    path = directory(tmp_path, {"a.weight": torch.ones(2, 4, dtype=torch.int8)}, '{"dtype": "bfloat16"}')
    with pytest.raises(FileError, match="is of type I8"):
        list(open_weights(path))




def test_what_a_directory_holds_besides_is_told_apart_by_its_name_and_form(tmp_path):
    path = directory(tmp_path, {
        "model.layers.0.up.weight": torch.ones(4, 8), "model.layers.1.up.weight": torch.ones(4, 8),
        "model.layers.0.experts.scales": torch.ones(3, 4), "conv.weight": torch.ones(2, 3, 5),
        "model.embed_tokens.weight": torch.ones(5, 4), "lm_head.weight": torch.ones(5, 4),
        "table": torch.ones(3, 3),
    }, '{"num_hidden_layers": 1, "tie_word_embeddings": true}')
    found = {w.name: (w.role, w.shape, w.tied_with) for w in open_weights(path)}
    assert found == {  # neither the head of a further prediction nor the tied one, as from_pretrained
        "model.layers.0.up": ("linear", (4, 8), ()), "model.layers.0.experts.scales": ("other", (3, 4), ()),
        "conv": ("conv", (2, 15), ()), "table": ("other", (3, 3), ()),
        "model.embed_tokens": ("embedding", (5, 4), ("lm_head",)),
    }
    (path / "config.json").write_text('{"num_hidden_layers": "1"}')
    assert {"model.layers.1.up", "lm_head"} <= {w.name for w in open_weights(path)}


def test_an_expert_of_two_files_is_read_across_them(tmp_path):
    prefix = "model.layers.0.block_sparse_moe.experts.0"
    rows = torch.arange(32.0).view(4, 8)
    values = {"w1": rows, "w3": -rows, "w2": torch.ones(8, 4)}
    path = directory(tmp_path, {f"{prefix}.{k}.weight": v for k, v in values.items()},
                     '{"model_type": "mixtral"}')
    weight = next(w for w in open_weights(path) if w.name.endswith("gate_up"))
    whole = torch.cat([values["w1"], values["w3"]])
    assert torch.equal(weight.read(), whole) and torch.equal(weight.read(slice(2, 7)), whole[2:7])
    assert torch.equal(weight.plain(whole), whole)


@pytest.mark.parametrize("rows", [
    slice(1, 3), slice(0, 0), slice(2, None), slice(None, 2), slice(-2, None), slice(-3, 3), slice(0, -1),
    slice(0, 5, 2)])
def test_rows_of_a_file_are_the_rows_of_all(rows, tmp_path):
    values = torch.arange(20.0).reshape(5, 4)
    weight, = open_weights(directory(tmp_path, {"a.weight": values}))
    assert torch.equal(weight.read(rows), values[rows])


def test_a_matrix_takes_part_in_its_own_product_the_right_way_round_only():
    layer, x = Around(nn.Linear(4, 4, bias=False)), torch.randn(3, 4)
    one = Product(layer)
    assert torch.equal(nn.functional.linear(x, one), layer(x)) and torch.equal(x @ one.T, layer(x))
    biased = Around(nn.Linear(4, 4))
    biased.bias = nn.Parameter(torch.full((4,), 1e6))  # taken away and added, it would round the product
    assert torch.equal(nn.functional.linear(x, Product(biased), biased.bias), biased(x))
    for wrong in (lambda: torch.matmul(x, one), lambda: nn.functional.linear(x, one.T),
                  lambda: torch.add(x, one.T), lambda: torch.dot(x[0], one),
                  lambda: torch.matmul(one.T, x)):
        with pytest.raises(TypeError, match="takes part in its own product only, not in"):
            wrong()


class Conv1D(nn.Module):
    """Not GPT-2's, which says its width: nf."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))


class Wide(nn.Module):
    """Says a width, and is called otherwise; torch's attention has a `proj_weight` too."""

    def __init__(self):
        super().__init__()
        self.nf, self.weight = 6, nn.Parameter(torch.ones(4, 6))
        self.x_proj_weight = nn.Parameter(torch.ones(2, 3))


class Gained(nn.Linear):
    """Keeps a table, or a layer, beside its weight."""

    def __init__(self, more):
        super().__init__(4, 3)
        self.more = more


def test_modules_that_are_called_as_others_are_not_taken_for_them():
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True), "conv": Conv1D(), "wide": Wide(),
        "table": Gained(nn.Parameter(torch.ones(5, 2))), "deep": Gained(nn.Linear(2, 2)),
        "named": nn.ModuleDict({"held_weights": nn.Linear(2, 3), "parametrizations": nn.Linear(2, 2)})})
    assert {w.name: (w.role, w.shape, w.replaceable) for w in weights(model)} == {
        "attention.in_proj_weight": ("linear", (12, 4), False),
        "attention.out_proj": ("linear", (4, 4), False),
        "attention.bias_k": ("other", (1, 4), False), "attention.bias_v": ("other", (1, 4), False),
        "conv": ("other", (4, 6), False), "wide": ("other", (4, 6), False),
        "wide.x_proj_weight": ("other", (2, 3), False),
        "table": ("linear", (3, 4), False), "table.more": ("other", (5, 2), False),
        "deep": ("linear", (3, 4), False), "deep.more": ("linear", (2, 2), True),
        "named.held_weights": ("linear", (3, 2), True), "named.parametrizations": ("linear", (2, 2), True)}


def test_what_no_layer_can_stand_in_for_is_adapted_only_when_it_is_named():
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "line": nn.Linear(4, 4)})
    assert list(LowRank().attach(model).layers) == ["line"]
    with pytest.raises(ConfigError, match=r"lstm\.weight_hh_l0 takes part in its module's own arithmetic"):
        LowRank(target_modules=["weight_hh_l0"]).attach(model, "second")


def test_a_parametrized_weight_that_two_layers_share_is_met_once():
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    model = nn.Sequential(one, other)
    for layer in model:
        parametrize.register_parametrization(layer, "weight", nn.Tanh(), unsafe=True)
    model[1].parametrizations.weight.original = model[0].parametrizations.weight.original
    assert [(w.name, w.tied_with) for w in weights(model)] == [("0", ("1",))]
