"""The experiments: the paper's settings composed and run on a tiny LLaMA, QBone, equal counts."""

from __future__ import annotations

import json

import pytest
import torch
from cases import some

import poise
from poise.data.components import MetaMath
from poise.errors import DataError
from poise.models.causal_lm import save_model
from poise.models.components import CausalLM
from poise_bone.functional import n_parameters


def problems(path, n=60):
    rows = [{"query": f"What is {i} + 2?", "type": "GSM_AnsAug",
             "response": f"{i} + 2 = {i + 2}.\nThe answer is: {i + 2}"} for i in range(n)]
    path.write_text(json.dumps(rows))
    return path


def tiny_llama(path):
    torch.manual_seed(0)
    made = CausalLM(architecture="LlamaForCausalLM", hidden_size=64, overrides={"intermediate_size": 128})
    return save_model(made.build(), made.tokenizer(), path)


def test_metamath_is_read_and_split(tmp_path):
    splits = MetaMath(path=str(problems(tmp_path / "m.json")), test=0.2, validation=0.1).load(0)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [42, 6, 12]
    one = splits.train[0]
    assert one.prompt.startswith("What is ") and one.prompt.endswith("?\n")
    assert one.completion.endswith(f"The answer is: {one.answer}") and one.answer.isdigit()


@pytest.mark.parametrize(("text", "words"), [
    ("{", "is not JSON"), ("[]", "holds no list of problems"), ('{"query": "a"}', "holds no list"),
    ('[{"query": "a", "response": "b"}, {"query": "a"}]', "row 1 needs the keys 'query' and 'response'"),
    ('[{"query": "a", "response": 4}]', "row 0 needs"), ("[[1]]", "row 0 needs"), ("[" * 100_000, "is not "
                                                                                                  "JSON"),
])
def test_other_files_are_refused_in_words(text, words, tmp_path):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        MetaMath(path=str(path)).load(0)


def test_the_papers_experiment_runs_on_a_tiny_llama(tmp_path):
    """As composed, but for the files and the number of steps: both adapters, their ranks and modules."""
    runs = poise.run([
        "experiment=bone_paper_llama2", f"model.path={tiny_llama(tmp_path / 'llama')}",
        f"data.path={problems(tmp_path / 'm.json')}", "data.test=0.2", "data.validation=0.1",
        "train.steps=3", "train.accumulate=2", "train.batch_size=4", "recipe.length=64",
        "recipe.eval_examples=4", f"paths.out={tmp_path / 'runs'}", "threads=1"])
    modules = [(64, 64)] * 4 + [(128, 64)] * 2 + [(64, 128)]
    wanted = [2 * sum(n_parameters("bone", o, i, 64) for o, i in modules),
              2 * sum(36 * (o + i) for o, i in modules)]
    assert [r.metrics["trainable_parameters"] for r in runs] == wanted
    for run in runs:
        settings = (run.directory / "resolved.yaml").read_text()
        assert all(line in settings for line in (
            "lr: 2.0e-05", "schedule: cosine", "precision: bf16", "weight_decay: 0.0", "length: 64"))


@pytest.mark.parametrize("variant", some(["bone", "bat", "bat_row", "bat_left"], keep=["bone", "bat_row"]))
def test_qbone_trains_over_a_packed_base(variant, tmp_path):
    run = poise.run([
        "recipe=finetune", "data=metamath", f"data.path={problems(tmp_path / 'm.json')}", "data.test=0.2",
        "data.validation=0.1",
        "model=causal_lm", f"model.path={tiny_llama(tmp_path / 'llama')}", "quantizer=affine",
        "quantizer.bits=4", "adapter=bone", "adapter.r=8", f"adapter.variant={variant}", "train.steps=8",
        "train.lr=0.01", "train.batch_size=4", "train.eval_every=0", "recipe.length=64",
        "recipe.eval_examples=2", f"paths.out={tmp_path / 'runs'}", "threads=1"])
    assert run.metrics["loss_after"] < run.metrics["loss_before"]
    assert (run.directory / "adapter" / "adapter.safetensors").is_file()


def test_the_controls_of_the_experiment_have_as_many_parameters():
    """SmolLM2's seven modules: bone r = 64 against LoRA r = 33, within 3 %."""
    modules = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    bone = 30 * sum(n_parameters("bone", o, i, 64) for o, i in modules)
    lora = 30 * sum(33 * (o + i) for o, i in modules)
    assert bone == 9_953_280 and abs(lora / bone - 1) < 0.03
