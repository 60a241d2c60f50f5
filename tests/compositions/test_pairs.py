"""What satisfies a contract composes: adapters on packed bases, one adapter after another."""

from __future__ import annotations

import pytest
import torch

from poise.config import Train
from poise.interfaces import Example, Parts, Splits
from poise.models.components import CausalLM
from poise.models.tokenizers import ByteTokenizer
from poise.quantizers import AbsMax, Affine, PackedLinear, quantize_model
from poise.recipes.components import Finetune
from poise.recipes.finetune import FinetuneTask, held_out_loss, pack
from poise.recipes.loop import Order, build_optimizer, fit
from poise.runs.context import RunContext
from poise.walk import weights
from poise_bone import Bone
from poise_bone.functional import delta
from poise_compander import WeightCompander
from poise_edgemoe import expert_errors, half_plan

EXAMPLES = [Example(f"{a}+{b}=", str(a + b)) for a in range(6) for b in range(6)]
ROWS = pack(EXAMPLES, ByteTokenizer(), 16, True)
IDS = ROWS.ids[:2]


def build(name="LlamaForCausalLM", quantizer=None):
    torch.manual_seed(0)
    model = CausalLM(architecture=name, hidden_size=16).build()
    if quantizer is not None:
        quantize_model(model, quantizer)
    return model


def train(model, attached, folder, steps=6, lr=2e-2):
    """Train through the one loop; return the held-out loss before and after."""
    settings = Train(steps=steps, batch_size=4, lr=lr, eval_every=0, checkpoint_every=0)
    task = FinetuneTask(model, ROWS, ROWS, Order(len(ROWS), 4, 0), 1, "cpu")
    before = held_out_loss(model.eval(), ROWS, 4, "cpu")
    fit(task, build_optimizer(settings, model.train(), attached), settings, RunContext(folder, quiet=True))
    return before, held_out_loss(model.eval(), ROWS, 4, "cpu")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def packed_bytes(model):
    return {n: b.clone() for n, b in model.named_buffers() if ".packed" in n}


@pytest.mark.parametrize("quantizer", [Affine(4, 8), AbsMax(3, 0)], ids=str)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_bone_on_a_packed_base_trains_beside_it_and_folds_into_dense_weights(name, quantizer, tmp_path):
    model = build(name, quantizer)
    base = {w.name: w.read().clone() for w in weights(model)}
    stored = packed_bytes(model)
    attached = Bone(r=4).attach(model)
    before, after = train(model, attached, tmp_path)
    assert after < before
    now = packed_bytes(model)
    assert len(now) == len(stored) > 0
    assert all(torch.equal(now[k.replace(".packed.", ".base.packed.", 1)] if k not in now else now[k], v)
               for k, v in stored.items())
    folded = attached.folded_state_dict()
    plain = build(name)
    plain.load_state_dict(folded)
    dense = {w.name: w.read() for w in weights(plain)}
    for layer, wrapped in attached.layers.items():
        D = wrapped.block().detach()
        assert isinstance(wrapped.base, PackedLinear) and D.any()
        assert torch.equal(dense[layer], base[layer] + delta(base[layer], D))
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)


def test_a_folded_model_can_be_packed_again(tmp_path):
    """Tune, fold, quantize: the packed model is the fold's, rounded."""
    model = build()
    attached = Bone(r=4).attach(model)
    train(model, attached, tmp_path)
    tuned = logits(model)
    plain = build()
    plain.load_state_dict(attached.folded_state_dict())
    quantize_model(plain, Affine(8, 8))
    assert torch.allclose(logits(plain), tuned, atol=0.05) and not torch.equal(logits(plain), tuned)


def test_compander_then_bone(tmp_path):
    """Train the weights companded, fold for good, then freeze them and train beside them."""
    model = build()
    first = WeightCompander().attach(model)
    start, middle = train(model, first, tmp_path / "a")
    trained = logits(model)
    first.detach()
    assert torch.allclose(logits(model), trained, atol=1e-6)
    base = {w.name: w.read().clone() for w in weights(model)}
    second = Bone(r=4).attach(model)
    _, end = train(model, second, tmp_path / "b")
    assert end < middle < start
    assert all(torch.equal(w.read(), base[w.name]) for w in weights(model))
    second.detach()
    assert torch.allclose(logits(model), trained, atol=1e-6)


def test_companded_weights_are_packed_as_they_are_seen(tmp_path):
    model = build()
    attached = WeightCompander(a=1.0, b=0.6).attach(model)
    train(model, attached, tmp_path)
    attached.detach()
    seen = {w.name: w.read().clone() for w in weights(model)}
    made = quantize_model(model, Affine(4, 8))["quantized"]
    assert made
    for w in weights(model):
        if w.name in made:
            assert torch.equal(w.read(), Affine(4, 8).quantize(seen[w.name]).dequantize())


def test_two_bones_one_after_the_other_add_up(tmp_path):
    model = build()
    start = {w.name: w.read().clone() for w in weights(model)}
    changes = []
    for r, folder in ((4, "a"), (3, "b")):
        attached = Bone(r=r, target_modules=["q_proj"]).attach(model)
        train(model, attached, tmp_path / folder)
        changes.append({n: delta(x.beneath(), x.D.detach()) for n, x in attached.layers.items()})
        plain = build()
        plain.load_state_dict(attached.folded_state_dict())
        model = plain
    for w in weights(model):
        if w.name in changes[0]:
            want = start[w.name] + changes[0][w.name] + changes[1][w.name]
            assert torch.allclose(w.read(), want, atol=1e-6) and not torch.equal(w.read(), start[w.name])


def test_a_tuned_mixture_is_folded_and_stored_expert_by_expert(tmp_path):
    model = build("MixtralForCausalLM")
    attached = Bone(r=4).attach(model)
    train(model, attached, tmp_path)
    plain = build("MixtralForCausalLM")
    plain.load_state_dict(attached.folded_state_dict())
    tuned = logits(plain)
    plan = half_plan(plain, expert_errors(plain, AbsMax(group=8), 4), high=8, low=4)
    made = quantize_model(plain, AbsMax(group=8), plan)["quantized"]
    assert made.keys() == plan.keys() and set(made.values()) == {10.0, 6.0}
    assert torch.allclose(logits(plain), tuned, atol=0.05)


class Sums:
    def load(self, seed=0):
        return Splits(EXAMPLES[:30], EXAMPLES[30:33], EXAMPLES[33:], {"source": "here"})


def test_a_run_with_model_quantizer_and_adapter_leaves_a_plain_directory(tmp_path):
    first = CausalLM(architecture="LlamaForCausalLM", hidden_size=16)
    train_ = Train(steps=8, batch_size=4, lr=2e-2, eval_every=0, checkpoint_every=0)
    context = RunContext(tmp_path, quiet=True)
    context.records.open()
    parts = Parts(data=Sums(), model=first, quantizer=Affine(4, 8), adapter=Bone(r=4), train=train_)
    metrics = Finetune(length=16).run(parts, context)
    context.records.close()
    assert metrics["loss_after"] < metrics["loss_before"]
    again = CausalLM(path=str(tmp_path / "folded"))
    held_out = pack(Sums().load().validation, again.tokenizer(), 16, False)
    model = again.build()
    assert all(type(m).__name__ != "PackedLinear" for m in model.modules())
    assert held_out_loss(model, held_out, 4, "cpu") == pytest.approx(metrics["loss_after"], rel=1e-5)
