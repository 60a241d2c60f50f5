"""What goes wrong in use: other optimizers, saturated weights, scalers, copies, files, late calls."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from networks import Tied, X, Y, largest_difference, loss_of, network, steady, train, w_of
from torch import nn

from poise.errors import ConfigError, FileError, RunError
from poise.quantizers import Affine, quantize_model
from poise.walk import weights
from poise_compander import LrMatched, PowerPropagation, WeightCompander, WeightNorm, functions

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OTHERS = {"RMSprop": 0.002, "Adagrad": 0.02, "NAdam": 0.004, "RAdam": 0.02, "Adamax": 0.004, "ASGD": 0.05,
          "Adadelta": 0.2}
paths = pytest.mark.parametrize("path", ["fast", "reference"])


# ------------------------------------------------------------------ any optimizer on the reference path


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("learn", ["none", "layer"])
def test_l2_on_w_is_a_penalty_whatever_the_optimizer(name, learn):
    cls, lr, decay = getattr(torch.optim, name), OTHERS[name], 0.05
    by_option, by_loss = steady(), steady()
    options = WeightCompander(path="reference", decay_on="w", learn=learn)
    first = options.attach(by_option)
    optimizer = first.optimizer(cls, lr=lr, weight_decay=decay)
    second = options.attach(by_loss)
    penalised = second.optimizer(cls, lr=lr)
    biases = [m.bias for m in by_loss if hasattr(m, "bias")]
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(by_option).backward()
        optimizer.step()
        penalised.zero_grad()
        held = [layer.weight for layer in second.layers.values()]
        penalty = sum(p.square().sum() for p in [*held, *biases])
        (loss_of(by_loss) + 0.5 * decay * penalty).backward()
        penalised.step()
    assert largest_difference(w_of(by_option), w_of(by_loss)) < 1e-12
    assert largest_difference(w_of(by_option), w_of(steady())) > 0.01


@pytest.mark.parametrize("name", ["NAdam", "RAdam"])
def test_a_decoupled_decay_on_w_goes_through_the_slope(name):
    cls, decay, moved = getattr(torch.optim, name), 0.3, {}
    for weight_decay in (0.0, decay):
        model = steady()
        attached = WeightCompander(path="reference").attach(model)
        v, w = attached.v("0").detach().clone(), attached.w("0")
        optimizer = attached.optimizer(cls, lr=0.01, weight_decay=weight_decay, decoupled_weight_decay=True)
        train(model, optimizer, 1)
        moved[weight_decay] = attached.v("0").detach() - v
    pull = 0.01 * decay * functions.arctan.derivative(v, 0.7, 0.7) * w
    assert torch.allclose(moved[0.0] - moved[decay], pull, rtol=1e-9, atol=1e-15)


def test_a_decay_that_is_not_known_acts_on_v_or_is_refused():
    attached = WeightCompander(path="reference").attach(steady())
    with pytest.raises(ConfigError, match=r"how Adafactor decays is not known.*decay_on='v'"):
        attached.optimizer(torch.optim.Adafactor, weight_decay=0.1)
    model, plain = steady(), steady()
    attached = WeightCompander(path="reference", decay_on="v").attach(model)
    WeightCompander(path="reference", decay_on="v").attach(plain)
    train(model, attached.optimizer(torch.optim.Adafactor, lr=0.01, weight_decay=0.1), 5)
    train(plain, torch.optim.Adafactor(plain.parameters(), lr=0.01, weight_decay=0.1), 5)
    assert largest_difference(w_of(model), w_of(plain)) < 1e-15


def test_an_optimizer_without_decay_and_one_with_a_closure():
    model = steady()
    attached = WeightCompander(path="reference").attach(model)
    before = float(loss_of(model).detach())
    train(model, attached.optimizer(torch.optim.Rprop, lr=0.01), 10)
    assert float(loss_of(model).detach()) < before
    with pytest.raises(ConfigError, match=r"LBFGS takes many gradients.*LBFGS\(model\.parameters\(\)\)"):
        attached.optimizer(torch.optim.LBFGS)
    bfgs = torch.optim.LBFGS(model.parameters(), lr=0.1)

    def closure():
        bfgs.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    assert float(bfgs.step(closure).detach()) > float(loss_of(model).detach())


# ------------------------------------------------------------------ slopes of nothing


@pytest.mark.parametrize("function", ["tanh", "erf"])
@pytest.mark.parametrize("cls", [Adam, AdamW])
@pytest.mark.parametrize("decay_on", ["w", "v"])
def test_a_weight_far_out_stays_and_spoils_nothing(function, cls, decay_on):
    """There the slope is 0 in floating point, and dL/dw cannot be had from dL/dv."""
    found = {}
    for path in ("fast", "reference"):
        model = steady()
        attached = WeightCompander(function, a=1.2, b=0.5, path=path, decay_on=decay_on).attach(model)
        saved = attached.state_dict()
        saved["0.v"] = saved["0.v"].clone()
        saved["0.v"][0, :2] = torch.tensor([40.0, -4000.0])
        attached.load_state_dict(saved)
        optimizer = attached.optimizer(cls, lr=0.01, weight_decay=0.02, max_grad_norm=1.0)
        train(model, optimizer, 20)
        found[path] = {n: attached.w(n).clone() for n in attached.companded}
        assert torch.equal(found[path]["0"][0, :2], torch.tensor([1.2, -1.2], dtype=torch.float64))
    assert all(bool(torch.isfinite(w).all()) for w in found["fast"].values())
    # clipping takes the norm of dL/dw, of which the reference path lacks what is frozen
    assert largest_difference(found["fast"], found["reference"]) < 1e-3


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
def test_weights_of_exactly_zero_do_not_spoil_powerpropagation(cls):
    model = steady()
    with torch.no_grad():
        model[0].weight[0].zero_()
    attached = PowerPropagation(2.0).attach(model)
    train(model, attached.optimizer(cls, lr=0.01, weight_decay=0.1), 5)
    assert bool(torch.isfinite(model[0].weight).all()) and not bool(model[0].weight[0].any())


# ------------------------------------------------------------------ what goes on around a step


@paths
@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(path, fused):
    found = []
    for scale in (False, True):
        model = steady(torch.float32)
        attached = WeightCompander(path=path).attach(model)
        optimizer = attached.optimizer(SGD, lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale)
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(w_of(model) | {"bias": model[0].bias.detach()})
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])  # 1024 divides without rounding


def test_a_gradient_that_overflowed_is_skipped_by_the_scaler():
    model = steady(torch.float32)
    optimizer = WeightCompander().attach(model).optimizer(SGD, lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model)).backward()
    model[0].weight.grad[0, 0] = math.inf
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("learn", ["layer", "network"])
def test_gradients_of_pairs_follow_those_of_the_weights(learn):
    """`model.zero_grad()` does not reach the pairs of the fast path; two gradients a step do add up."""
    found = []
    for path in ("fast", "reference"):
        model = steady()
        attached = WeightCompander(path=path, learn=learn, a=0.9, b=0.6).attach(model)
        optimizer = attached.optimizer(SGD, lr=0.02)
        for _ in range(8):
            model.zero_grad()
            for part in (slice(0, 8), slice(8, 16)):
                loss_of(model, X[part], Y[part]).backward()
            optimizer.step()
        assert attached.pairs[0].numbers() != (0.9, 0.6)
        found.append(w_of(model))
    assert largest_difference(*found) < 1e-12


@paths
def test_new_parameters_may_be_added(path):
    model = steady()
    optimizer = WeightCompander(path=path).attach(model).optimizer(SGD, lr=0.1)
    model.append(nn.Linear(3, 3).double())
    before = model[3].weight.detach().clone()
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.01})
    train(model, optimizer, 1)
    assert torch.allclose(model[3].weight, before - 0.01 * model[3].weight.grad, rtol=1e-12)


@paths
def test_an_optimizer_is_not_copied_without_its_model(path):
    optimizer = WeightCompander(path=path).attach(steady()).optimizer(SGD, lr=0.1)
    for act in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(RunError, match=r"is not copied or pickled: .*state_dict\(\)"):
            act(optimizer)


@paths
def test_a_folded_or_detached_model_does_not_train(path):
    model = steady()
    attached = WeightCompander(path=path).attach(model)
    optimizer = attached.optimizer(SGD, lr=0.1)
    attached.fold()
    loss_of(model).backward()
    with pytest.raises(RunError, match=r"call unfold\(\)"):
        optimizer.step()
    attached.unfold()
    train(model, optimizer, 1)
    attached.detach()
    with pytest.raises(RunError, match="detached for good: attach again"):
        attached.unfold()
    with pytest.raises(RunError, match="optimizer of the plain model"):
        optimizer.step()


def test_moments_of_another_memory_format_are_refused():
    def start(memory_format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=memory_format)
        return model, WeightCompander().attach(model).optimizer(SGD, lr=0.1, momentum=0.9)

    def step(model, optimizer):
        model(torch.ones(1, 3, 5, 5)).square().sum().backward()
        optimizer.step()

    model, optimizer = start(torch.contiguous_format)
    step(model, optimizer)
    twin, other = start(torch.channels_last)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(RunError, match=r"weight of 0 is .* with strides .* its v or a moment is"):
        step(twin, other)


@paths
def test_the_folded_checkpoint_is_a_snapshot(path):
    model = steady()
    attached = WeightCompander(path=path).attach(model)
    folded = attached.folded_state_dict()
    kept = copy.deepcopy(folded)
    train(model, attached.optimizer(SGD, lr=0.5), 3)
    assert all(torch.equal(kept[k], folded[k]) for k in kept)


def test_a_write_through_the_walk_is_seen():
    """Quantizers write by it."""
    model = steady()
    attached = WeightCompander().attach(model)
    first = next(iter(weights(model)))
    first.write(first.read() * 0.5)
    for act in (lambda: model(X), attached.state_dict):
        with pytest.raises(RunError, match="written to by something else"):
            act()
    attached.refresh()
    model(X)


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("fused", [False, True])
def test_another_optimizer_is_found_however_it_writes(cls, fused):
    """torch's fused kernels do not raise a tensor's version."""
    model = steady(torch.float32)
    attached = WeightCompander().attach(model)
    own, other = attached.optimizer(SGD, lr=0.1), cls(model.parameters(), lr=0.1, fused=fused)
    train(model, own, 1)
    loss_of(model).backward()
    other.step()
    for act in (lambda: loss_of(model), own.step, attached.state_dict):
        with pytest.raises(RunError, match="written to by something else"):
            act()


def test_a_learned_a_that_grew_comes_back_in_either_order():
    """Weights beyond the bound of the a that an attachment starts with."""
    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        attached = WeightCompander(a=0.45, b=0.7, learn="network").attach(model)
        return model, attached, attached.optimizer(Adam, lr=0.1)

    def go(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(X) - 20).square().mean().backward()
            optimizer.step()

    model, _, optimizer = start()
    go(model, optimizer, 40)
    assert float(model[0].weight.abs().max()) > 1.1 * functions.arctan.bound(0.45)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer, 5)
    for order in ((0, 1), (1, 0)):
        again, _, other = start()
        for i in order:
            (again, other)[i].load_state_dict(copy.deepcopy(saved[i]))
        go(again, other, 5)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    alone = start()[0]
    alone.load_state_dict(saved[0])
    with pytest.raises(RunError, match="along with the optimizer's"):
        alone(X)


@paths
def test_a_weight_that_was_rounded_to_its_bound_loads_again(path):
    model = steady(torch.float32)
    attached = WeightCompander("erf", path=path).attach(model)
    saved = attached.state_dict()
    saved["0.v"] = saved["0.v"].clone()
    saved["0.v"][0] = 20.0
    attached.load_state_dict(saved)
    assert float(attached.w("0").max()) == pytest.approx(0.7)
    plain = attached.folded_state_dict()
    model.load_state_dict(plain)
    other = steady(torch.float32)
    again = WeightCompander("erf", path=path).attach(other)
    other.load_state_dict(plain)
    assert torch.allclose(other(X.float()), model(X.float()), rtol=1e-6)
    train(other, again.optimizer(SGD, lr=0.1), 2)
    assert bool(torch.isfinite(again.w("0")).all())


@paths
@pytest.mark.parametrize("pattern", ["0.*", "*"])
def test_no_group_reaches_learned_pairs(path, pattern):
    attached = WeightCompander(path=path, learn="layer").attach(steady())
    groups = [{"params": [pattern], "lr": 0.3, "weight_decay": 0.1}]
    optimizer = attached.optimizer(SGD, lr=0.05, weight_decay=0.2, groups=groups)
    learned = {id(p) for p in optimizer.learned}
    found = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups
             for p in group["params"] if id(p) in learned}
    assert found == {(0.05, 0.0)}


def test_the_state_of_another_kind_of_optimizer_is_refused_before_it_is_loaded():
    def start(path):
        model = steady()
        optimizer = WeightCompander(path=path).attach(model).optimizer(SGD, lr=0.1, momentum=0.9)
        return optimizer, train(model, optimizer, 1)

    fast, _ = start("fast")
    reference, _ = start("reference")
    plain = copy.deepcopy(fast.state_dict())
    for group in plain["param_groups"]:
        del group["companded"]
    before = fast.state_dict()
    for own, saved in ((fast, reference.state_dict()), (reference, fast.state_dict()), (fast, plain)):
        with pytest.raises(FileError, match="state of another kind of optimizer"):
            own.load_state_dict(saved)
    assert str(fast.state_dict()) == str(before)


def test_an_optimizers_state_without_the_models_is_found():
    model, other = steady(), steady()
    optimizer = WeightCompander().attach(model).optimizer(SGD, lr=0.1)
    train(model, optimizer, 3)
    again = WeightCompander().attach(other).optimizer(SGD, lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RunError, match="load the model's checkpoint along"):
        other(X)
    other.load_state_dict(model.state_dict())
    other(X)


@pytest.mark.parametrize("switched", [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}])
def test_momentum_may_be_switched_on_later(switched):
    found = []
    for path in ("fast", "reference"):
        model = steady()
        optimizer = WeightCompander(path=path).attach(model).optimizer(SGD, lr=0.05)
        train(model, optimizer, 2)
        for group in optimizer.param_groups:
            group.update(switched)
        train(model, optimizer, 3)
        found.append(w_of(model))
    assert largest_difference(*found) < 1e-13


def test_a_number_of_a_pair_may_be_frozen():
    found = []
    for path in ("fast", "reference"):
        model = steady()
        attached = WeightCompander(path=path, learn="layer", decay_on="w").attach(model)
        attached.pairs[0].raw_b.requires_grad_(False)
        for p in attached.pairs[1].parameters():
            p.requires_grad_(False)
        train(model, attached.optimizer(SGD, lr=0.1, weight_decay=0.1), 5)
        assert attached.pairs[0].numbers()[0] != 0.7
        assert attached.pairs[0].numbers()[1] == pytest.approx(0.7)
        assert attached.pairs[1].numbers() == pytest.approx((0.7, 0.7))
        found.append(w_of(model))
    assert largest_difference(*found) < 1e-12


@paths
def test_detaching_twice_leaves_a_new_attachment_alone(path):
    model = steady()
    first = WeightCompander(path=path).attach(model)
    first.detach()
    second = WeightCompander(path=path).attach(model)
    first.detach()
    with pytest.raises(ConfigError, match="already"):
        WeightCompander(path=path).attach(model)
    with pytest.raises(ConfigError, match="detached for good"):
        first.optimizer(SGD, lr=0.1)
    train(model, second.optimizer(SGD, lr=0.1), 1)


@paths
def test_a_norm_that_is_no_number_shows_as_with_torch(path):
    model = steady()
    optimizer = WeightCompander(path=path).attach(model).optimizer(SGD, lr=0.1, max_grad_norm=1e-3)
    loss_of(model).backward()
    model[2].bias.grad[0] = math.nan
    optimizer.step()
    assert bool(torch.isnan(model[0].bias).all())  # clip_grad_norm_ would make all gradients NaN


# ------------------------------------------------------------------ what is chosen


def test_naming_no_layer_is_not_naming_all():
    with pytest.raises(ConfigError, match=r"target_modules=\[\]: it names no layer"):
        WeightCompander(target_modules=[])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("make", "found"), [
    (lambda: nn.Linear(8, 0), "it has none"),
    (lambda: nn.Sequential(nn.Linear(0, 4), nn.ConvTranspose2d(0, 4, 2)), "it has none"),
    (lambda: nn.Embedding(4, 2), r"the model has embeddings \(1\)"),
    (lambda: packed(nn.Linear(8, 8), nn.Embedding(4, 2)),
     r"the model has packed weights \(1\), embeddings \(1\)"),
], ids=["empty", "empty convolution", "embedding", "packed"])
@pytest.mark.parametrize("component", [WeightCompander(), WeightNorm(), LrMatched()])
def test_a_model_without_weights_to_take_says_what_it_has(component, make, found):
    with pytest.raises(ConfigError, match=f"^no weight can be taken: {found}$"):
        component.attach(make())


def packed(*layers):
    model = nn.Sequential(*layers)
    quantize_model(model, Affine(bits=8), {"0": 8})
    return model


@paths
def test_layers_without_weights_are_left_alone(path):
    model = network()
    model.append(nn.Linear(0, 2).double())
    attached = WeightCompander(path=path).attach(model)
    assert list(attached.companded) == ["0", "3"] and attached.report()["layers"] == 2


@pytest.mark.parametrize("options", [{"a": 1e300}, {"b": 1e300}, {"a": 1e-300}])
def test_pairs_that_leave_no_digits_are_refused(options):
    with pytest.raises(ConfigError, match="from 1e-06 to 1e"):
        WeightCompander(**options)


@pytest.mark.parametrize("groups", [["0.*"], [{"lr": 0.1}], [{"params": "0.*"}], [{"params": [3]}]])
def test_groups_that_are_none_are_refused(groups):
    with pytest.raises(ConfigError, match="allowed is a dict with params, a list of patterns"):
        WeightCompander().attach(steady()).optimizer(SGD, lr=0.1, groups=groups)


@pytest.mark.parametrize("clip", ["1", math.nan, -1.0])
def test_a_norm_that_is_none_is_refused(clip):
    with pytest.raises(ConfigError, match=r"max_grad_norm=.*allowed is a number > 0"):
        WeightCompander().attach(steady()).optimizer(SGD, lr=0.1, max_grad_norm=clip)


def test_the_matched_control_takes_what_the_compander_takes():
    for model in (Tied(), network()):
        control = LrMatched(a=1.0, b=0.5).attach(model)
        optimizer = control.optimizer(SGD)  # torch's own default rate
        assert optimizer.param_groups[0]["lr"] == 4e-3
        rate = torch.tensor(0.1)
        groups = control.optimizer(SGD, lr=rate, foreach=False).param_groups
        assert [float(g["lr"]) for g in groups] == pytest.approx([0.4, 0.1][: len(groups)]) and rate == 0.1
        with pytest.raises(ConfigError, match="held by lr_matched already"):
            LrMatched(decay_on="v").attach(model)
        control.detach()
        by_v = LrMatched(decay_on="v").attach(model)
        by_v.optimizer(torch.optim.Rprop)  # has no decay
        by_v.detach()
        own = {id(p) for p in optimizer.param_groups[0]["params"]}
        attached = WeightCompander().attach(model)
        assert own == {id(attached.parameter(name)) for name in attached.companded}


def test_weight_norm_on_a_companded_model_is_refused():
    model = steady()
    WeightCompander().attach(model)
    with pytest.raises(ConfigError, match="weight_norm: 0 is companded already: call detach"):
        WeightNorm().attach(model)


def test_a_checkpoint_with_a_weight_that_is_no_number_is_refused():
    model = steady()
    WeightCompander().attach(model)
    with pytest.raises(FileError, match="1 weights of 0 are NaN or Inf; none of its"):
        broken = steady().state_dict()
        broken["0.weight"][0, 0] = math.nan
        model.load_state_dict(broken)
