"""The compander as an adapter: what it takes, bounds, folding, checkpoints, other writers, bad input."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from networks import X, largest_difference, loss_of, network, train, w_of
from torch import nn

from poise.errors import ConfigError, FileError, RunError
from poise.models.components import ResNet20
from poise.testing import check_adapter
from poise.walk import weights
from poise_compander import LrMatched, WeightCompander
from poise_compander.bounds import MARGIN
from poise_compander.diagnostics import bands, layer_table
from poise_compander.functions import arctan

SGD = torch.optim.SGD
paths = pytest.mark.parametrize("path", ["fast", "reference"])


@paths
@pytest.mark.parametrize("learn", ["none", "layer", "network"])
@pytest.mark.parametrize("function", ["arctan", "arsinh"])
def test_the_contract_is_kept(path, learn, function):
    check_adapter(WeightCompander(function, path=path, learn=learn))


# ------------------------------------------------------------------ attach


@paths
def test_attaching_keeps_the_output_and_takes_linears_and_convolutions(path):
    torch.manual_seed(0)
    model = ResNet20(in_channels=2, classes=3, width=4).build().eval()
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    before = model(x)
    attached = WeightCompander(a=1.0, b=0.6, path=path).attach(model)
    if path == "fast":
        assert torch.equal(model(x), before)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-6)
    assert len(attached.layers) == 20 == attached.report()["layers"]
    own, rest = attached.trainable()
    ids = {id(p) for p in own["params"] + rest["params"]}
    assert len(own["params"]) == 20 and ids == {id(p) for p in model.parameters()}


@paths
def test_layers_are_chosen_by_patterns(path):
    model = network()
    assert list(WeightCompander(exclude_modules=["3"], path=path).attach(model).layers) == ["0"]
    assert isinstance(model[3].weight, nn.Parameter)
    assert list(WeightCompander(target_modules=["3"], path=path).attach(network()).layers) == ["3"]
    for options in ({"exclude_modules": ["4"]}, {"target_modules": ["4"]}):
        with pytest.raises(ConfigError, match=r"pattern '4' matches no weight .*weights end in: 0, 3"):
            WeightCompander(path=path, **options).attach(network())


@paths
@pytest.mark.parametrize("learn", ["none", "layer", "network"])
def test_learned_numbers_have_shape_one_and_start_where_they_are_told(path, learn):
    for guard in ("softplus", "exp", "none"):
        attached = WeightCompander(a=0.5, b=1.0, learn=learn, guard=guard, path=path).attach(network())
        learned = [p for pair in attached.pairs for p in pair.parameters()]
        assert len(learned) == {"none": 0, "network": 2, "layer": 4}[learn]
        assert all(p.shape == (1,) for p in learned)
        for pair in attached.pairs:
            assert pair.numbers() == pytest.approx((0.5, 1.0), rel=1e-12)


def test_a_pair_without_a_guard_may_cross_zero_and_with_one_may_not():
    for guard, least in (("none", -math.inf), ("softplus", 0), ("exp", 0)):
        attached = WeightCompander(a=0.5, b=0.5, learn="network", guard=guard).attach(network())
        with torch.no_grad():
            attached.pairs[0].raw_b.sub_(3.0)
        assert attached.pairs[0].numbers()[1] > least
        assert (attached.pairs[0].numbers()[1] < 0) == (guard == "none")


@paths
def test_the_gradient_of_v_is_that_of_w_times_the_slope(path):
    """One SGD step from outside: v moves by -lr Psi'(v) dL/dw."""
    model, plain = network(), network()
    attached = WeightCompander(a=1.0, b=0.6, path=path).attach(model)
    before = {n: attached.v(n).detach().clone() for n in attached.companded}
    optimizer = attached.optimizer(SGD, lr=0.1)
    for m in (model, plain):
        loss_of(m).backward()
    optimizer.step()
    for name, layer in (("0", plain[0]), ("3", plain[3])):
        want = before[name] - 0.1 * arctan.derivative(before[name], 1.0, 0.6) * layer.weight.grad
        assert torch.allclose(attached.v(name), want, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ the bound


@paths
def test_weights_at_the_bound_are_refused_with_the_a_that_fits(path):
    model = network()
    model[3].weight.data[0, 0] = 2.0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    words = r"1 weights of 3 reach .*a=0\.7 \(largest \|w\| 2\): give a=(\S+) or more"
    with pytest.raises(ConfigError, match=words) as e:
        WeightCompander(a=0.7, path=path).attach(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    fitting = float(str(e.value).split("give a=")[1].split()[0])
    assert fitting == pytest.approx(2.0 / (math.pi / 2 * (1 - MARGIN)), rel=1e-3)
    assert WeightCompander(a=fitting, path=path).attach(model).report()["over_bound"] == 0


@paths
def test_clamping_moves_what_is_over_the_bound_and_counts_it(path):
    model = network()
    model[3].weight.data[0, :3] = torch.tensor([2.0, -5.0, 1.0])
    inside = model[3].weight.detach().clone()
    attached = WeightCompander(a=0.7, bound_policy="clamp", path=path).attach(model)
    limit = 0.999 * 0.7 * math.pi / 2
    report = attached.report()
    assert report["over_bound"] == 2 and report["near_bound"] == 1
    assert report["at_bound"] == {"3": {"largest": 5.0, "near": 1, "over": 2}}
    assert torch.allclose(model[3].weight[0, :2], torch.tensor([limit, -limit], dtype=torch.float64))
    assert torch.allclose(model[3].weight[1:], inside[1:], rtol=1e-12)


@paths
@pytest.mark.parametrize("learn", ["none", "layer"])
def test_growing_gives_a_larger_a_where_it_is_needed(path, learn):
    model = network()
    model[3].weight.data[0, 0] = 2.0
    before = w_of(model)
    attached = WeightCompander(a=0.7, bound_policy="grow", learn=learn, path=path).attach(model)
    assert largest_difference(w_of(model), before) < 1e-12
    a = {name: attached.scales(name).numbers()[0] for name in ("0", "3")}
    assert arctan.bound(a["3"]) > 2.0 / (1 - MARGIN) - 1e-9 and arctan.bound(a["3"]) < 2.01
    assert a["0"] == pytest.approx(0.7 if learn == "layer" else a["3"])  # one pair for a network


def test_the_margin_is_a_thousandth_of_the_bound():
    for share, over in ((0.9989, 0), (0.9991, 1)):
        for sign in (1, -1):
            model = network()
            model[3].weight.data[0, 0] = sign * share * arctan.bound(0.7)
            assert WeightCompander(bound_policy="clamp").attach(model).report()["over_bound"] == over


def test_small_filters_overflow_at_a_of_one_half():
    """Kaiming-uniform with fan-in 9: bound sqrt(6/9) = 0.816 > 0.785."""
    conv = nn.Conv2d(1, 256, 3)
    nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
    with pytest.raises(ConfigError, match="weights of 0 reach the bound"):
        WeightCompander(a=0.5, b=1.0).attach(nn.Sequential(conv))
    WeightCompander("arsinh", a=0.5, b=1.0).attach(nn.Sequential(conv))  # has no bound


# ------------------------------------------------------------------ what the rule amounts to


@paths
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decay_is_l2_on_w_through_the_chain_rule(momentum, path):
    """SGD with decay equals SGD on loss + lambda/2 (sum w^2 + sum of all else squared)."""
    decay, models = 0.05, (network(), network())
    first = WeightCompander(a=0.9, b=0.6, path=path).attach(models[0])
    second = WeightCompander(a=0.9, b=0.6, path="reference").attach(models[1])
    one = first.optimizer(SGD, lr=0.05, momentum=momentum, weight_decay=decay)
    two = second.optimizer(SGD, lr=0.05, momentum=momentum)
    others = [p for n, p in models[1].named_parameters() if "original" not in n]
    for _ in range(20):
        train(models[0], one, 1)
        two.zero_grad()
        w = sum(m.weight.square().sum() for m in (models[1][0], models[1][3]))
        rest = sum(p.square().sum() for p in others)
        (loss_of(models[1]) + 0.5 * decay * (w + rest)).backward()
        two.step()
    assert largest_difference(w_of(models[0]), w_of(models[1])) < 1e-13


@paths
@pytest.mark.parametrize(("a", "b"), [(0.7, 0.35), (1.0, 0.6), (0.8, 2.0)])
@pytest.mark.parametrize("decay", [0.0, 5e-3])
def test_b_is_a_pure_learning_rate_knob(a, b, decay, path):
    """(a, b, lr) and (a, 1, lr / b^2) give the same w under SGD with momentum and L2 on w."""
    found = []
    for stretch, scale in ((b, 1.0), (1.0, 1 / b**2)):
        model = network()
        attached = WeightCompander(a=a, b=stretch, path=path).attach(model)
        optimizer = attached.optimizer(SGD, lr=0.02, momentum=0.9, weight_decay=decay)
        optimizer.param_groups[0]["lr"] *= scale
        found.append(w_of(train(model, optimizer, 50)))
    assert largest_difference(found[0], w_of(network())) > 1e-2
    assert largest_difference(*found) < 1e-12


@pytest.mark.parametrize("decay_on", ["w", "v"])
def test_near_zero_it_is_plain_sgd_at_the_matched_rate(decay_on):
    """The first step from small weights: -lr (a/b)^2 g, and the decay, up to third order."""
    start = network()
    for p in (start[0].weight, start[3].weight):
        p.data.mul_(1e-3)
    model, plain = copy.deepcopy(start), copy.deepcopy(start)
    for component, net in ((WeightCompander, model), (LrMatched, plain)):
        attached = component(a=1.0, b=0.5, decay_on=decay_on).attach(net)
        train(net, attached.optimizer(SGD, lr=1e-3, weight_decay=200.0), 1)  # a fifth of each weight
    moved = w_of(plain)["3"] - w_of(start)["3"]
    assert float((w_of(model)["3"] - w_of(plain)["3"]).abs().max()) < 1e-4 * float(moved.abs().max())


class ByHand:
    """Adam and AdamW on w, written out: the step is multiplied by the slope and applied to v."""

    def __init__(self, model, a, b, lr, decay, decoupled, betas=(0.9, 0.999), eps=1e-8):
        self.model, self.a, self.b, self.lr, self.decay = model, a, b, lr, decay
        self.decoupled, self.betas, self.eps, self.t = decoupled, betas, eps, 0
        self.companded = {"0.weight", "3.weight"}
        self.p = dict(model.named_parameters())
        self.v = {n: b * torch.tan(self.p[n].detach() / a) for n in self.companded}
        self.m = {n: torch.zeros_like(p) for n, p in self.p.items()}
        self.s = {n: torch.zeros_like(p) for n, p in self.p.items()}

    @torch.no_grad()
    def step(self):
        self.t += 1
        for n, p in self.p.items():
            g = p.grad if self.decoupled else p.grad + self.decay * p
            self.m[n] = self.betas[0] * self.m[n] + (1 - self.betas[0]) * g
            self.s[n] = self.betas[1] * self.s[n] + (1 - self.betas[1]) * g**2
            m = self.m[n] / (1 - self.betas[0] ** self.t)
            s = self.s[n] / (1 - self.betas[1] ** self.t)
            step = -self.lr * m / (s.sqrt() + self.eps)
            if self.decoupled:
                step = step - self.lr * self.decay * p
            if n in self.companded:
                v = self.v[n]
                self.v[n] = v + self.a * self.b / (self.b**2 + v**2) * step
                p.copy_(self.a * torch.atan(self.v[n] / self.b))
            else:
                p.add_(step)


@paths
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adaptive_rules_work_on_w_and_step_times_the_slope(cls, decay, path):
    """With a rate that changes: AdamW's decay on w uses the rate of the step, not the first one."""
    a, b, lr = 0.9, 0.5, 0.01
    model, plain = network(), network()
    optimizer = WeightCompander(a=a, b=b, path=path).attach(model).optimizer(cls, lr=lr, weight_decay=decay)
    hand = ByHand(plain, a, b, lr, decay, cls is torch.optim.AdamW)
    for rate in [0.01] * 20 + [0.005, 0.001]:
        hand.lr = rate
        for group in optimizer.param_groups:
            group["lr"] = rate
        train(model, optimizer, 1)
        plain.zero_grad()
        loss_of(plain).backward()
        hand.step()
    assert largest_difference(w_of(model), w_of(plain)) < 1e-10
    assert torch.allclose(model[3].bias, plain[3].bias, atol=1e-10)
    assert largest_difference(w_of(model), w_of(network())) > 0.05


@pytest.mark.parametrize("learn", ["layer", "network"])
@pytest.mark.parametrize("function", ["arctan", "erf", "arsinh", "tanh"])
def test_the_gradients_of_learned_pairs_are_those_of_autograd(function, learn):
    models = {path: network() for path in ("fast", "reference")}
    found = {}
    for path, model in models.items():
        attached = WeightCompander(function, 0.9, 0.6, learn=learn, path=path).attach(model)
        optimizer = attached.optimizer(SGD, lr=0.0, weight_decay=0.1)
        loss_of(model).backward()
        optimizer.step()
        found[path] = [p.grad for pair in attached.pairs for p in pair.parameters()]
    assert all(float(g.abs()) > 1e-4 for g in found["fast"])
    for mine, theirs in zip(found["fast"], found["reference"], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10)


# ------------------------------------------------------------------ fold, save, detach


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fold_then_unfold_is_bit_exact(dtype, path):
    model = network(dtype=dtype)
    attached = WeightCompander(path=path).attach(model)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    v = {n: attached.v(n).detach().clone() for n in attached.companded}
    x = X.to(dtype)
    before = model(x).detach()
    for _ in range(3):
        attached.fold()
        attached.fold()
        assert attached.folded and isinstance(model[0].weight, nn.Parameter)
        assert torch.equal(model(x), before)
        attached.unfold()
        attached.unfold()
        assert not attached.folded
        assert model.state_dict().keys() == kept.keys()
        assert all(torch.equal(model.state_dict()[k], t) for k, t in kept.items())
        assert all(torch.equal(attached.v(n), t) for n, t in v.items())


@paths
def test_a_folded_weight_that_was_changed_is_taken_over(path):
    model = network()
    attached = WeightCompander(path=path).attach(model)
    attached.fold()
    model[0].weight.data.mul_(0.5)
    want = model[0].weight.detach().clone()
    attached.unfold()
    assert torch.allclose(model[0].weight, want, rtol=1e-12)
    assert torch.allclose(attached.v("0"), 0.7 * torch.tan(want / 0.7), rtol=1e-12)


@paths
def test_training_goes_on_after_fold_and_unfold(path):
    """An optimizer made before still drives the weights."""
    model, straight = network(), network()
    attached, other = (WeightCompander(path=path).attach(m) for m in (model, straight))
    optimizer = attached.optimizer(SGD, lr=0.05, momentum=0.9)
    train(model, optimizer, 3)
    attached.fold()
    attached.unfold()
    train(model, optimizer, 3)
    train(straight, other.optimizer(SGD, lr=0.05, momentum=0.9), 6)
    assert largest_difference(w_of(model), w_of(straight)) < 1e-12


@paths
@pytest.mark.parametrize("learn", ["none", "layer"])
def test_the_folded_checkpoint_is_plain_and_leaves_the_live_model_usable(path, learn):
    model, plain = network(), network(seed=1)
    attached = WeightCompander(a=0.9, b=0.5, learn=learn, path=path).attach(model)
    optimizer = attached.optimizer(SGD, lr=0.05)
    train(model, optimizer, 3)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    plain.load_state_dict(attached.folded_state_dict())
    assert torch.equal(plain(X), model(X))
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())
    train(model, optimizer, 1)
    assert not torch.equal(plain(X), model(X))


@paths
def test_folding_a_copy_leaves_the_original_usable(path):
    """torch's remove_parametrizations on a deepcopy deletes a property of the class that both share."""
    model = network()
    attached = WeightCompander(path=path).attach(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    plain = network(seed=1)
    plain.load_state_dict(attached.folded_state_dict())
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(0.5)  # an average of weights, say: no complaint from a copy
    assert not torch.equal(copied(X), model(X)) and torch.equal(plain(X), model(X))
    train(model, attached.optimizer(SGD, lr=0.05), 2)
    assert [w.name for w in weights(copied)] == ["0", "3"]


def test_the_trap_of_torch_is_still_there():
    """When this fails, torch has mended it, and the note in the card can go."""
    from torch.nn.utils import parametrize

    model = network()
    WeightCompander(path="reference").attach(model)
    copied = copy.deepcopy(model)
    parametrize.remove_parametrizations(copied[0], "weight")
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        model(X)


@paths
def test_plain_checkpoints_load(path):
    model, plain = network(), network(seed=1)
    attached = WeightCompander(path=path).attach(model)
    model.load_state_dict(plain.state_dict())
    assert torch.allclose(model(X), plain(X), rtol=1e-12)
    assert torch.allclose(attached.v("0"), 0.7 * torch.tan(plain[0].weight / 0.7), rtol=1e-10)
    train(model, attached.optimizer(SGD, lr=0.05), 1)
    large = network(seed=2).state_dict() | {"3.weight": torch.full((3, 8), 3.0, dtype=torch.float64)}
    before = attached.folded_state_dict()
    with pytest.raises(FileError, match=r"24 weights of 3 reach the bound 1\.1 .*a=1\.912 or more; none"):
        model.load_state_dict(large)
    assert all(torch.equal(before[k], t) for k, t in attached.folded_state_dict().items())


@paths
@pytest.mark.parametrize("other", [
    {"a": 0.8}, {"b": 0.5}, {"function": "tanh", "a": 1.2}, {"learn": "network"}])
def test_a_checkpoint_of_another_pair_is_refused(path, other):
    attached = WeightCompander(path=path).attach(network())
    optimizer = attached.optimizer(SGD, lr=0.1, momentum=0.9)
    train(attached.model, optimizer, 2)
    second = WeightCompander(path=path, **other).attach(network())
    with pytest.raises(FileError, match=r"saved with .*, here .*: attach with the options it was saved"):
        second.load_state_dict(attached.state_dict())
    if other.keys() != {"learn"}:
        with pytest.raises(FileError, match=r"optimizer state of 0: saved with a=0\.7"):
            second.optimizer(SGD, lr=0.1, momentum=0.9).load_state_dict(optimizer.state_dict())
    if path == "reference":
        with pytest.raises(RuntimeError, match=r"compander, 0: saved with"):
            second.model.load_state_dict(attached.model.state_dict(), strict=False)


@paths
def test_state_dicts_are_checked(path):
    attached = WeightCompander(path=path).attach(network())
    saved = {k: v.clone() for k, v in attached.state_dict().items()}
    shapes = {k: tuple(v.shape) for k, v in saved.items() if "spec" not in k}
    assert shapes == {"0.v": (8, 6), "3.v": (3, 8)}
    other = WeightCompander(path=path).attach(network(seed=1))
    other.load_state_dict(saved)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in saved.items())
    assert largest_difference(w_of(other.model), w_of(attached.model)) < 1e-15
    for bad, words in (
        ({**saved, "0.v": saved["0.v"].T}, r"0.v has shape \(6, 8\), here \(8, 6\)"),
        ({k: v for k, v in saved.items() if k != "3.v"}, "3.v is missing"),
        ({**saved, "5.v": saved["0.v"]}, "5.v is not of this model"),
    ):
        with pytest.raises(FileError, match=words):
            WeightCompander(path=path).attach(network()).load_state_dict(bad)


@paths
def test_detaching_keeps_what_was_learned_and_lets_go(path):
    model = network()
    attached = WeightCompander(path=path).attach(model)
    train(model, attached.optimizer(SGD, lr=0.05), 3)
    w = w_of(model)
    assert attached.detach() is model
    assert model.state_dict().keys() == network().state_dict().keys()
    assert all(torch.equal(w_of(model)[k], v) for k, v in w.items())
    assert all(p.requires_grad for p in model.parameters())
    assert not model._forward_pre_hooks and not model._load_state_dict_post_hooks
    train(model, SGD(model.parameters(), lr=0.01), 2)  # anyone may
    WeightCompander(path=path).attach(model)


def test_a_fast_model_is_a_plain_model():
    model = network()
    WeightCompander().attach(model)
    assert model.state_dict().keys() == network().state_dict().keys()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))


# ------------------------------------------------------------------ other writers


def test_a_foreign_optimizer_is_found_at_the_next_forward():
    model = network()
    attached = WeightCompander().attach(model)
    foreign = SGD(model.parameters(), lr=0.01)
    loss_of(model).backward()
    foreign.step()
    with pytest.raises(RunError, match=r"weight of 0 was written to .*attached\.optimizer"):
        model(X)
    attached.refresh()
    before = w_of(model)
    model(X)
    train(model, attached.optimizer(SGD, lr=0.0), 1)
    assert largest_difference(w_of(model), before) < 1e-12


def test_a_foreign_optimizer_is_found_at_the_next_step():
    model = network()
    attached = WeightCompander().attach(model)
    own = attached.optimizer(SGD, lr=0.01)
    loss_of(model).backward()
    SGD(model.parameters(), lr=0.01).step()
    with pytest.raises(RunError, match="was written to by something else"):
        own.step()


def test_an_initialisation_after_attach_is_found_on_both_paths():
    fast, reference = network(), network()
    WeightCompander().attach(fast)
    WeightCompander(path="reference").attach(reference)
    nn.init.zeros_(fast[0].weight)
    with pytest.raises(RunError, match="was written to"):
        fast(X)
    nn.init.zeros_(reference[0].weight)
    with pytest.raises(RunError, match="written to in place; on the reference path such a write is lost"):
        reference(X)
    reference[0].weight = torch.full((8, 6), 0.1, dtype=torch.float64)  # goes through the inverse
    assert torch.allclose(reference[0].weight, torch.full((8, 6), 0.1, dtype=torch.float64))


def test_weights_that_are_written_over_the_bound_cannot_be_taken_over():
    model = network()
    attached = WeightCompander().attach(model)
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    with pytest.raises(RunError, match=r"48 weights of 0 reach the bound 1\.1 .*a=3\.187 or more"):
        attached.refresh()


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("options", [
    {"a": 0.0}, {"b": -1.0}, {"a": math.nan}, {"b": math.inf}, {"bound_policy": "ignore"}, {"learn": "all"},
    {"guard": "relu"}, {"path": "quick"}, {"decay_on": "x"},
])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"WeightCompander.{next(iter(options))}="):
        WeightCompander(**options)
    with pytest.raises(ConfigError, match="no function 'tan'"):
        WeightCompander("tan")


@paths
def test_attaching_twice_is_refused(path):
    for other in ("fast", "reference"):
        model = network()
        WeightCompander(path=path).attach(model)
        with pytest.raises(ConfigError, match=r"0 is (companded|reparameterized) already: .*detach"):
            WeightCompander(path=other).attach(model)


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_what_to_do(dtype, path):
    with pytest.raises(ConfigError, match=r"0 is b?float16: .*float32 .*autocast"):
        WeightCompander(path=path).attach(network(dtype=dtype))


@paths
def test_weights_that_are_not_finite_are_refused(path):
    model = network()
    model[3].weight.data[0, 0] = math.nan
    with pytest.raises(ConfigError, match="3 has NaN or Inf"):
        WeightCompander(path=path).attach(model)


def test_an_optimizer_without_a_rule_is_refused_on_the_fast_path():
    attached = WeightCompander().attach(network())
    with pytest.raises(ConfigError, match=r"no rule for Rprop; it drives SGD, .*path='reference'"):
        attached.optimizer(torch.optim.Rprop, lr=0.1)
    with pytest.raises(ConfigError, match="no torch optimizer class"):
        attached.optimizer("sgd", lr=0.1)
    with pytest.raises(ConfigError, match="max_grad_norm=0: allowed"):
        attached.optimizer(SGD, lr=0.1, max_grad_norm=0)
    with pytest.raises(ConfigError, match=r"group pattern '7.\*' matches no parameter"):
        attached.optimizer(SGD, lr=0.1, groups=[{"params": ["7.*"]}])
    attached.fold()
    with pytest.raises(ConfigError, match=r"call unfold\(\) before"):
        attached.optimizer(SGD, lr=0.1)


def test_any_optimizer_drives_v_on_the_reference_path():
    model = network()
    attached = WeightCompander(path="reference").attach(model)
    optimizer = attached.optimizer(torch.optim.RMSprop, lr=0.001, weight_decay=0.01)
    before = float(loss_of(model))
    assert float(loss_of(train(model, optimizer, 50))) < before


# ------------------------------------------------------------------ diagnostics


@paths
def test_the_report_counts_nearly_frozen_weights(path):
    """Psi' is below a tenth of its largest value where v^2 > 9 b^2."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    v = torch.tensor([[0.0, 2.9, 3.1, -30.0]], dtype=torch.float64) * 0.5
    model[0].weight.data.copy_(arctan.forward(v, 0.7, 0.5))
    attached = WeightCompander(a=0.7, b=0.5, bound_policy="clamp", path=path).attach(model)
    report = attached.report()
    assert report["saturated_share"] == 0.5
    assert report["effective_lr_factor"] == pytest.approx(1.96)
    (row,) = layer_table(attached)
    assert row["saturated_share"] == 0.5 and row["near_zero_share"] == 0.25
    slopes = 1.4 / (1 + torch.tensor([0.0, 2.9, 3.1, 30.0], dtype=torch.float64) ** 2)
    assert row["mean_lr_factor"] == pytest.approx(float(slopes.square().mean()), rel=1e-9)


def test_bands_are_percentiles():
    assert bands(torch.arange(101.0)) == pytest.approx([0, 7, 16, 31, 50, 69, 84, 93, 100])


# ------------------------------------------------------------------ the control arm


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_the_matched_control_is_plain_training_with_two_rates(cls):
    model, plain = network(), network()
    optimizer = LrMatched(a=1.0, b=0.6).attach(model).optimizer(cls, lr=0.01, weight_decay=0.02)
    own = [plain[0].weight, plain[3].weight]
    rest = [p for p in plain.parameters() if all(p is not q for q in own)]
    groups = [{"params": own, "lr": 0.01 * (1.0 / 0.6) ** 2}, {"params": rest}]
    reference = cls(groups, lr=0.01, weight_decay=0.02)
    train(model, optimizer, 10)
    train(plain, reference, 10)
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in model.state_dict().items())


def test_the_matched_control_changes_nothing_but_rates():
    model = network()
    attached = LrMatched(a=1.0, b=0.5).attach(model)
    assert attached.factor == 4 and attached.report()["effective_lr_factor"] == 4
    x = model(X)
    attached.fold()
    attached.unfold()
    assert torch.equal(attached.detach()(X), x)
    assert set(attached.state_dict()) == {"0.weight", "3.weight"}


def test_the_matched_control_refuses_tensors_that_do_not_fit():
    attached = LrMatched().attach(network())
    saved = attached.state_dict()
    for bad in ({"0.weight": saved["0.weight"]}, {**saved, "0.weight": saved["0.weight"].T}):
        with pytest.raises(FileError):
            attached.load_state_dict(bad)


