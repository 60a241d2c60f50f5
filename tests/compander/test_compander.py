"""The compander: w = a arctan(v / b); what trains is v, what the network computes with is w."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.errors import ConfigError, FileError
from poise.models.components import ResNet20
from poise.walk import weights
from poise_compander import Arctan, Compander, LrMatched, Psi
from poise_compander.parametrization import l2_term, within_bound

few = settings(max_examples=80, derandomize=True, deadline=None, database=None)
AB = st.floats(0.3, 3.0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


X, Y = randn(16, 6), randn(16, 3, seed=1)


def loss_of(model, x=X, y=Y):
    return (model(x) - y).square().mean()


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model


def w_of(model):
    return {w.name: w.read().clone() for w in weights(model)}


def largest_difference(first, second):
    return max(float((first[k] - second[k]).abs().max()) for k in first)


# ------------------------------------------------------------------ the function


@few
@given(AB, AB, st.floats(-0.98, 0.98))
def test_the_inverse_undoes_the_map(a, b, share):
    w = torch.tensor([share * Arctan.bound(a)], dtype=torch.float64)
    assert torch.allclose(Arctan.map(Arctan.inverse(w, a, b), a, b), w, rtol=1e-12, atol=1e-15)


@few
@given(AB, AB, st.floats(-30, 30))
def test_the_map_undoes_the_inverse(a, b, v):
    v = torch.tensor([v], dtype=torch.float64)
    assert torch.allclose(Arctan.inverse(Arctan.map(v, a, b), a, b), v, rtol=1e-9, atol=1e-12)


@few
@given(AB, AB, st.floats(-5, 5))
def test_the_derivative_is_the_slope(a, b, v):
    h = 1e-5
    v = torch.tensor([v], dtype=torch.float64)
    slope = (Arctan.map(v + h, a, b) - Arctan.map(v - h, a, b)) / (2 * h)
    assert torch.allclose(Arctan.derivative(v, a, b), slope, rtol=1e-6, atol=1e-9)
    cosine = a / b * torch.cos(Arctan.map(v, a, b) / a) ** 2
    assert torch.allclose(Arctan.derivative(v, a, b), cosine, rtol=1e-9)


@pytest.mark.parametrize(("a", "b"), [(0.7, 0.7), (1.0, 0.6), (0.5, 1.0)])
def test_autograd_agrees_with_the_derivative(a, b):
    psi, v = Psi(a, b), randn(20).requires_grad_()
    assert torch.autograd.gradcheck(psi, (v,))
    psi(v).sum().backward()
    assert torch.allclose(v.grad, psi.derivative(v.detach()), rtol=1e-12)


@few
@given(AB, AB)
def test_the_map_is_odd_increasing_and_bounded(a, b):
    v = torch.linspace(-100, 100, 501, dtype=torch.float64)
    w = Arctan.map(v, a, b)
    assert torch.equal(w, -Arctan.map(-v, a, b)) and (w.diff() > 0).all()
    assert w.abs().max() < Arctan.bound(a) == a * math.pi / 2
    assert float(Arctan.derivative(torch.zeros(1, dtype=torch.float64), a, b)) == pytest.approx(a / b)


# ------------------------------------------------------------------ the bound


def test_a_bare_tan_would_return_a_wrong_branch():
    assert float(Arctan.map(Arctan.inverse(torch.tensor(2.0), 0.7, 1.0), 0.7, 1.0)) == pytest.approx(
        -0.199, abs=1e-3)
    with pytest.raises(ConfigError, match=r"1 weights reach the bound a pi/2 = 1\.1"):
        Psi(0.7, 1.0).right_inverse(torch.tensor([0.1, 2.0]))


def test_weights_at_the_bound_are_refused_with_the_a_that_fits():
    model = network()
    model[3].weight.data[0, 0] = 2.0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    words = r"1 weights of 3 reach .*largest 2.*adapter\.a=(\S+) or more"
    with pytest.raises(ConfigError, match=words) as e:
        Compander(a=0.7).attach(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    fitting = float(str(e.value).split("adapter.a=")[1].split()[0])
    assert Compander(a=fitting).attach(model).report()["clamped"] == 0


def test_clamping_moves_what_is_over_the_bound_and_counts_it():
    model = network()
    model[3].weight.data[0, :2] = torch.tensor([2.0, -5.0])
    inside = model[3].weight.detach().clone()
    attached = Compander(a=0.7, bound="clamp").attach(model)
    limit = 0.999 * 0.7 * math.pi / 2
    assert attached.report()["clamped"] == 2 and attached.clamped == {"0": 0, "3": 2}
    assert torch.allclose(model[3].weight[0, :2], torch.tensor([limit, -limit], dtype=torch.float64))
    assert torch.allclose(model[3].weight[1:], inside[1:], rtol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_margin_is_a_thousandth_of_the_bound(sign):
    bound = Arctan.bound(0.7)
    for share, moved in ((0.9989, 0), (0.9991, 1)):
        w, over = within_bound(torch.tensor([sign * share * bound]), 0.7, "w", "clamp")
        assert over == moved and float(w.abs().max()) <= 0.999 * bound * (1 + 1e-6)


@pytest.mark.parametrize("options", [{"a": 0.0}, {"b": -1.0}, {"bound": "grow"}, {"function": "tan"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"Compander.{next(iter(options))}="):
        Compander(**options)


# ------------------------------------------------------------------ attach


def test_attaching_keeps_the_output_and_takes_linears_and_convolutions():
    torch.manual_seed(0)
    model = ResNet20(in_channels=2, classes=3, width=4).build().eval()
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    before = model(x)
    attached = Compander(a=1.0, b=0.6).attach(model)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-6)
    assert len(attached.layers) == 20 == attached.report()["layers"]
    own, rest = attached.trainable()
    assert own["weight_decay"] == 0 and len(own["params"]) == 20
    ids = {id(p) for p in own["params"] + rest["params"]}
    assert ids == {id(p) for p in model.parameters()}


def test_excluded_layers_stay_plain():
    model = network()
    attached = Compander(exclude=["3"]).attach(model)
    assert list(attached.layers) == ["0"] and isinstance(model[3].weight, nn.Parameter)
    with pytest.raises(ConfigError, match="'4' matches no weight"):
        Compander(exclude=["4"]).attach(network())


def test_tied_weights_are_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="compander: 0 is tied with 2"):
        Compander().attach(nn.Sequential(layer, nn.Tanh(), layer))


def test_the_gradient_of_v_is_that_of_w_times_the_slope():
    model, plain = network(), network()
    attached = Compander(a=1.0, b=0.6).attach(model)
    loss_of(model).backward()
    loss_of(plain).backward()
    for name, layer in (("0", plain[0]), ("3", plain[3])):
        v = attached.v(name)
        want = layer.weight.grad * attached.psi(name).derivative(v.detach())
        assert torch.allclose(v.grad, want, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ what SGD does


def test_the_l2_term_is_the_gradient_of_half_lambda_w_squared():
    psi, v = Psi(0.8, 0.5), randn(30).requires_grad_()
    (0.5 * 0.01 * psi(v).square().sum()).backward()
    assert torch.allclose(l2_term(psi, v.detach(), 0.01), v.grad, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decay_is_l2_on_w_through_the_chain_rule(momentum):
    """SGD with decay equals SGD on loss + lambda/2 (sum w^2 + sum of all else squared)."""
    decay, models = 0.05, (network(), network())
    attached = [Compander(a=0.9, b=0.6).attach(m) for m in models]
    first = attached[0].optimizer(torch.optim.SGD, lr=0.05, momentum=momentum, weight_decay=decay)
    second = attached[1].optimizer(torch.optim.SGD, lr=0.05, momentum=momentum)
    others = [p for n, p in models[1].named_parameters() if "original" not in n]
    for _ in range(20):
        train(models[0], first, 1)
        second.zero_grad()
        w = sum(m.weight.square().sum() for m in (models[1][0], models[1][3]))
        rest = sum(p.square().sum() for p in others)
        (loss_of(models[1]) + 0.5 * decay * (w + rest)).backward()
        second.step()
    assert largest_difference(models[0].state_dict(), models[1].state_dict()) < 1e-13


@pytest.mark.parametrize(("a", "b"), [(0.7, 0.35), (1.0, 0.6), (0.8, 2.0)])
@pytest.mark.parametrize("decay", [0.0, 5e-3])
def test_b_is_a_pure_learning_rate_knob(a, b, decay):
    """(a, b, lr) and (a, 1, lr / b^2) give the same w under SGD with momentum and L2 on w."""
    found = []
    for stretch, scale in ((b, 1.0), (1.0, 1 / b**2)):
        model = network()
        attached = Compander(a=a, b=stretch).attach(model)
        optimizer = attached.optimizer(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=decay)
        optimizer.param_groups[0]["lr"] *= scale
        found.append(w_of(train(model, optimizer, 50)))
    assert largest_difference(found[0], w_of(network())) > 1e-2
    assert largest_difference(*found) < 1e-12


def test_near_zero_it_is_plain_sgd_at_the_matched_rate():
    """The first step from small weights: -lr (a/b)^2 g up to third order."""
    start = network()
    for p in (start[0].weight, start[3].weight):
        p.data.mul_(1e-3)
    model, plain = copy.deepcopy(start), copy.deepcopy(start)
    train(model, Compander(a=1.0, b=0.5).attach(model).optimizer(torch.optim.SGD, lr=1e-3), 1)
    train(plain, LrMatched(a=1.0, b=0.5).attach(plain).optimizer(torch.optim.SGD, lr=1e-3), 1)
    moved = w_of(plain)["3"] - w_of(start)["3"]
    assert float((w_of(model)["3"] - w_of(plain)["3"]).abs().max()) < 1e-4 * float(moved.abs().max())


# ------------------------------------------------------------------ what Adam does


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


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adaptive_rules_work_on_w_and_step_times_the_slope(cls, decay):
    a, b, lr = 0.9, 0.5, 0.01
    model, plain = network(), network()
    optimizer = Compander(a=a, b=b).attach(model).optimizer(cls, lr=lr, weight_decay=decay)
    hand = ByHand(plain, a, b, lr, decay, cls is torch.optim.AdamW)
    for _ in range(25):
        train(model, optimizer, 1)
        plain.zero_grad()
        loss_of(plain).backward()
        hand.step()
    assert largest_difference(w_of(model), w_of(plain)) < 1e-10
    assert torch.allclose(model[3].bias, plain[3].bias, atol=1e-10)
    assert largest_difference(w_of(model), w_of(network())) > 0.05


def test_adam_with_a_changing_rate_follows_the_schedule():
    """AdamW's decay on w uses the rate of the step, not the first one."""
    model, plain = network(), network()
    attached = Compander(a=0.9, b=0.5).attach(model)
    optimizer = attached.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    hand = ByHand(plain, 0.9, 0.5, 0.01, 0.1, True)
    for rate in (0.01, 0.005, 0.001):
        for group in optimizer.param_groups:
            group["lr"] = rate
        hand.lr = rate
        train(model, optimizer, 1)
        plain.zero_grad()
        loss_of(plain).backward()
        hand.step()
    assert largest_difference(w_of(model), w_of(plain)) < 1e-12


def test_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match="no rule for Rprop; allowed are SGD, Adam, AdamW"):
        Compander().attach(network()).optimizer(torch.optim.Rprop, lr=0.1)


# ------------------------------------------------------------------ fold, save, detach


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fold_then_unfold_is_bit_exact(dtype):
    model = network(dtype=dtype)
    attached = Compander().attach(model)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
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
        assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())


def test_a_folded_weight_that_was_changed_is_taken_over():
    model = network()
    attached = Compander().attach(model)
    attached.fold()
    model[0].weight.data.mul_(0.5)
    want = model[0].weight.detach().clone()
    attached.unfold()
    assert torch.allclose(model[0].weight, want, rtol=1e-12)
    assert torch.allclose(attached.v("0"), 0.7 * torch.tan(want / 0.7), rtol=1e-12)


def test_training_goes_on_after_fold_and_unfold():
    """An optimizer made before still drives the weights."""
    model, straight = network(), network()
    attached, other = Compander().attach(model), Compander().attach(straight)
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    train(model, optimizer, 3)
    attached.fold()
    attached.unfold()
    train(model, optimizer, 3)
    train(straight, other.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9), 6)
    assert largest_difference(w_of(model), w_of(straight)) < 1e-12


def test_the_folded_checkpoint_is_plain_and_leaves_the_live_model_usable():
    model, plain = network(), network(seed=1)
    attached = Compander(a=0.9, b=0.5).attach(model)
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.05)
    train(model, optimizer, 3)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    folded = attached.folded_state_dict()
    plain.load_state_dict(folded)
    assert torch.equal(plain(X), model(X))
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())
    train(model, optimizer, 1)
    assert not torch.equal(plain(X), model(X))


def test_a_copy_is_a_model_of_its_own():
    model = network()
    Compander().attach(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    copied[0].parametrizations.weight.original.data.mul_(2)
    assert not torch.equal(copied(X), model(X))
    assert [w.name for w in weights(copied)] == ["0", "3"]


def test_state_dicts_hold_v_only_and_are_checked():
    attached = Compander().attach(network())
    saved = {k: v.clone() for k, v in attached.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in saved.items()} == {"0.v": (8, 6), "3.v": (3, 8)}
    other = Compander().attach(network(seed=1))
    other.load_state_dict(saved)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in saved.items())
    for bad, words in (
        ({**saved, "0.v": saved["0.v"].T}, r"0.v has shape \(6, 8\), here \(8, 6\)"),
        ({"0.v": saved["0.v"]}, "3.v is missing"),
        ({**saved, "5.v": saved["0.v"]}, "5.v is not of this model"),
    ):
        with pytest.raises(FileError, match=words):
            Compander().attach(network()).load_state_dict(bad)


def test_detaching_keeps_what_was_learned():
    model = network()
    attached = Compander().attach(model)
    train(model, attached.optimizer(torch.optim.SGD, lr=0.05), 3)
    w = w_of(model)
    assert attached.detach() is model
    assert model.state_dict().keys() == network().state_dict().keys()
    assert all(torch.equal(w_of(model)[k], v) for k, v in w.items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_report_counts_nearly_frozen_weights():
    """Psi' is below a tenth of its largest value where v^2 > 9 b^2."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    v = torch.tensor([[0.0, 2.9, 3.1, -30.0]], dtype=torch.float64) * 0.5
    model[0].weight.data.copy_(Arctan.map(v, 0.7, 0.5))
    report = Compander(a=0.7, b=0.5, bound="clamp").attach(model).report()
    assert report["saturated_share"] == 0.5
    assert report["effective_lr_factor"] == pytest.approx(1.96)


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
