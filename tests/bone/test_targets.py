"""Which layers a configuration of PEFT means: what PEFT itself adapts, and what of that a file lacks."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from bone_forms import randn
from safetensors.torch import load_file, save_file
from torch import nn

from poise.errors import FileError
from poise.models.components import CausalLM
from poise.quantizers import AbsMax, quantize_model
from poise_bone import Bone, load_peft, read_adapter, targets
from poise_bone.targets import layers_meant

peft = pytest.importorskip("peft")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def model_of(name="Llama", **more):
    torch.manual_seed(0)
    return CausalLM(architecture=f"{name}ForCausalLM", hidden_size=16, layers=3, **more).build().eval()


def classifier():
    return transformers.LlamaForSequenceClassification(model_of().config).eval()


MODELS = {"llama": model_of, "tied": lambda: model_of(overrides={"tie_word_embeddings": True}),
          "mixtral": lambda: model_of("Mixtral"), "classifier": classifier}
CONFIGURATIONS = [
    {"target_modules": ["q_proj", "mlp.down_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [2], "layers_pattern": "lay(er)+s"},
    {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"], "layers_to_transform": 1},
    {"target_modules": "all-linear"}, {"target_modules": "ALL-linear", "task_type": "SEQ_CLS"},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.self_attn.o_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.(q|k)_proj"},
    {"target_modules": None}, {"target_modules": None, "layers_to_transform": [1]},
    {"target_modules": r".*layers\.[01]\.self_attn\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.2\.self_attn\..*", "exclude_modules": ["o_proj"]},
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda c: json.dumps(c)[:60])
def test_what_is_meant_is_what_peft_adapts(config, name):
    model = MODELS[name]()
    try:
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.MissConfig(r=4, **config))
    except ValueError as error:  # a router of transformers is no linear; nothing is left to adapt
        pytest.skip(str(error)[:80])
    blocks = [n for n, _ in theirs.named_parameters() if ".miss_block." in n]
    want = [n.removeprefix("base_model.model.").partition(".miss_block")[0] for n in blocks]
    assert sorted(layers_meant(config, model)) == sorted(want)
    Bone(r=2).attach(model, "another")  # nor does another adapter, or packing, change what is meant
    assert sorted(layers_meant(config, model)) == sorted(want)
    packed = MODELS[name]()
    quantize_model(packed, AbsMax(8, 8))
    assert sorted(layers_meant(config, packed)) == sorted(want)


def written(tmp_path, **config):
    """Let PEFT write an adapter of random blocks, and return its configuration's file and tensors."""
    theirs = peft.get_peft_model(model_of(), peft.MissConfig(r=4, **config))
    for n, p in enumerate(q for name, q in theirs.named_parameters() if "miss_block" in name):
        p.data.copy_(0.1 * randn(*p.shape, seed=n))
    theirs.save_pretrained(str(tmp_path))
    fields = {**json.loads((tmp_path / CONFIG).read_text()), **config}  # PEFT writes what it resolved
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    return theirs, load_file(tmp_path / TENSORS)


KINDS = [c for c in CONFIGURATIONS if "task_type" not in c]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: json.dumps(c)[:60])
def test_a_missing_and_an_extra_block_are_named(config, tmp_path):
    theirs, tensors = written(tmp_path, **config)
    model, ids = model_of(), torch.tensor([[1, 2, 3, 200, 17]])
    load_peft(model, tmp_path)
    with torch.no_grad():
        want = theirs.eval()(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits, want, atol=1e-5)
    lost = sorted(tensors)[len(tensors) // 2]
    layer = lost.removeprefix("base_model.model.").removesuffix(".miss_block")
    save_file({k: t for k, t in tensors.items() if k != lost}, tmp_path / TENSORS)
    for read in (load_peft, lambda m, path: read_adapter(path).attach(m)):
        bare = model_of()
        with pytest.raises(FileError, match=rf"means {layer}, and there is no block for that"):
            read(bare, tmp_path)
        assert not any(type(m).__name__ == "BoneLayer" for m in bare.modules())
    save_file({**tensors, "base_model.model.lm_head.miss_block": torch.ones(4, 257)}, tmp_path / TENSORS)
    with pytest.raises(FileError, match="has a block for lm_head, which its configuration does not mean"):
        load_peft(model_of(), tmp_path)


def test_every_layer_without_a_block_is_named_up_to_eight(tmp_path):
    _, tensors = written(tmp_path, target_modules="all-linear")
    kept = dict(sorted(tensors.items())[:-10])
    save_file(kept, tmp_path / TENSORS)
    with pytest.raises(FileError, match=r"means (model\.layers\.[12]\.\w+\.\w+, ){7}\S+ and 2 more, and"):
        load_peft(model_of(), tmp_path)


@pytest.mark.parametrize(("fields", "words"), [
    ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern=\{'q_proj': 8\} is not read here"),
    ({"layers_to_transform": "1"}, "layers_to_transform='1' of the adapter is no number of a layer"),
    ({"layers_to_transform": [True]}, r"layers_to_transform=\[True\] of the adapter is no number"),
    ({"layers_to_transform": 1, "layers_pattern": 5}, "layers_pattern=5 of the adapter is no name"),
    ({"layers_to_transform": 1, "target_modules": "all-linear"}, "beside target_modules that are no list"),
    ({"target_modules": "(q_proj"}, r"a regular expression .* cannot be read: .*unterminated"),
    ({"target_modules": []}, r"has a block for model\.layers\.0\.self_attn\.q_proj, .* and \d more|q_proj"),
])
def test_fields_that_mean_nothing_are_refused(fields, words, tmp_path):
    written(tmp_path, target_modules=["q_proj"])
    kept = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**kept, **fields}))
    with pytest.raises(FileError, match=words):
        load_peft(model_of(), tmp_path)


def test_null_is_refused_where_peft_has_no_default():
    with pytest.raises(FileError, match=r"target_modules of the adapter is null, .* a model of type None"):
        layers_meant({"target_modules": None}, nn.Sequential(nn.Linear(4, 4)))


def test_an_expression_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 0.5)
    name = "a_layer_with_a_name_of_forty_characters_"
    model = nn.ModuleDict({name: nn.Linear(16, 8)})
    for fields in ({"target_modules": r"(([a-z0-9._])+)+X"}, {"target_modules": [name], "exclude_modules":
                   "([a-z_]+)+X"}):
        with pytest.raises(FileError, match=r"a regular expression .* takes more than 0\.5 s"):
            layers_meant(fields, model)
