"""A layer's product and gradients are those of the changed weight, whatever form, type and tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from bone_forms import GUIDED, SHAPES, VARIANTS, cases, options, randn
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from poise.adapters import layer as adapted
from poise.errors import ConfigError, RunError
from poise.quantizers import Affine, quantize_model
from poise_bone import Bone, lean
from poise_bone.functional import changed, compose, delta, forward

few = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def one(variant, o=16, i=24, shape=None, *, bias=True, dtype=torch.float64, scale=0.3, **more):
    """Return a model of one linear, what is attached, and its layer, with a block that acts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(i, o, bias=bias)).to(dtype)
    attached = Bone(**options(variant, shape or SHAPES[variant]), **more).attach(model)
    layer = attached.layers["0"]
    with torch.no_grad():
        layer.D.copy_(scale * randn(*layer.D.shape, seed=1))
    return model, attached, layer


@pytest.fixture(params=[1, 1 << 30], ids=["small chunks", "one chunk"])
def chunk(request, monkeypatch):
    """Chunks of one block of rows, and one chunk of all."""
    monkeypatch.setattr(lean, "CHUNK", {"cpu": request.param, "other": request.param})
    monkeypatch.setattr(lean, "FACTORED", request.param)


# ------------------------------------------------------------------ values and gradients


@pytest.mark.filterwarnings("ignore:bone. mini_r=1")
@few
@given(cases(), st.sampled_from([(), (1,), (0,), (2,), (3, 4), (2, 1, 5)]), st.booleans(), st.booleans())
def test_product_and_gradients_are_those_of_the_changed_weight(case, lead, bias, large):
    variant, o, i, shape = case
    budget = 1 << 30 if large else 1
    model, _, layer = one(variant, o, i, shape, bias=bias)
    before = lean.CHUNK, lean.FACTORED
    lean.CHUNK, lean.FACTORED = {"cpu": budget, "other": budget}, budget
    try:
        x, dy = randn(*lead, i, seed=2).requires_grad_(), randn(*lead, o, seed=3)
        got = torch.autograd.grad(y := model(x), [x, layer.D], dy)
    finally:
        lean.CHUNK, lean.FACTORED = before
    W, b = layer.base.weight.detach(), layer.bias
    x2, D = x.detach().requires_grad_(), layer.D.detach().clone().requires_grad_()
    want_y = forward(x2, W, D, variant, None if b is None else b.detach())
    want = torch.autograd.grad(want_y, [x2, D], dy)
    assert y.shape == want_y.shape
    for a, c in zip((y, *got), (want_y, *want), strict=True):
        assert torch.allclose(a, c, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(variant, tokens, chunk):
    model, _, layer = one(variant)
    x = randn(tokens, 24, seed=2).requires_grad_()

    def run(x, D):
        layer.D.data = D.detach()
        with torch.no_grad():
            return model(x)

    y = model(x)
    dy = randn(*y.shape, seed=3)
    dx, dD = torch.autograd.grad(y, [x, layer.D], dy)
    kept, step = layer.D.detach().clone(), 1e-6
    for tensor, grad, call in ((x.detach(), dx, lambda t: run(t, kept)), (kept, dD, lambda t: run(x, t))):
        direction = randn(*tensor.shape, seed=4)
        rise = call(tensor + step * direction) - call(tensor - step * direction)
        slope = (rise * dy).sum() / (2 * step)
        assert float((grad * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("variant", ["bat", "bone_free"])
@pytest.mark.parametrize("tokens", some([2, 9], keep=[2]))
def test_gradcheck_passes_with_and_without_a_gradient_of_x(variant, tokens, chunk):
    _, _, layer = one(variant)
    rows = layer.rows(layer._changed)
    product = lean.factored if variant == "bat" and tokens == 2 else lean.recomputed
    D, x, bias = layer.D.detach().requires_grad_(), randn(tokens, 24, seed=2), layer.bias.detach()
    assert torch.autograd.gradcheck(lambda D: product(x, D, rows, bias), (D,))
    assert torch.autograd.gradcheck(
        lambda x, D, b: product(x, D, rows, b), (x.requires_grad_(), D, bias.clone().requires_grad_()))
    assert torch.autograd.gradcheck(lambda x: product(x, D.detach(), rows, bias), (x,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_need_not_be_contiguous(variant, chunk):
    model, _, _ = one(variant)
    wide = randn(24, 7, 2, seed=2)
    for x in (wide[..., 0].T, wide.permute(2, 1, 0)[:, ::2]):
        assert not x.is_contiguous()
        assert torch.allclose(model(x), model(x.contiguous()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["bat", "bone_free"])
def test_differentiating_twice_is_refused_in_words(variant):
    for tokens in (1, 40):
        model, _, layer = one(variant)
        x = randn(tokens, 24).requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="to not have been used"):
            torch.autograd.grad(g.sum(), layer.D, retain_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            g.sum().backward()


@pytest.mark.parametrize("variant", ["bone", "mini", "bone_out", "bat_row", "bat_left"])
def test_the_other_forms_can_be_differentiated_twice(variant):
    model, _, _ = one(variant)
    x = randn(5, 24, seed=2)
    assert torch.autograd.gradgradcheck(lambda x: model(x).tanh(), (x.requires_grad_(),))


# ------------------------------------------------------------------ the start, and types


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_block_changes_no_bit_of_the_output(variant, dtype, tokens, bias, chunk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias)).to(dtype)
    x = randn(2, tokens, 24, dtype=dtype)
    before = model(x).detach()
    Bone(**options(variant, SHAPES[variant])).attach(model)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_half_precision_base_is_within_its_rounding(variant, dtype, tokens, chunk):
    model, _, layer = one(variant, dtype=dtype, scale=0.1)
    assert layer.D.dtype == torch.float32
    x = randn(tokens, 24, dtype=dtype, seed=2)
    y = model(x)
    y.float().square().sum().backward()
    W = layer.base.weight.double()
    want = x.double() @ (W + delta(W, layer.D.detach().double(), variant)).T + layer.bias.double()
    assert y.dtype == dtype and layer.D.grad.dtype == torch.float32
    error = float((y.double() - want).detach().abs().max())
    assert error < 12 * torch.finfo(dtype).eps * float(want.detach().abs().max())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_under_autocast_product_and_gradients_are_those_of_half_precision(variant, tokens, chunk):
    model, _, layer = one(variant, dtype=torch.float32, scale=0.1)
    x = randn(tokens, 24, dtype=torch.float32, seed=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    got = torch.autograd.grad(y.float().square().sum(), [x, layer.D])
    want_y = model(x)
    want = torch.autograd.grad(want_y.square().sum(), [x, layer.D])
    for a, b in zip((y, *got), (want_y, *want), strict=True):
        assert float((a.double() - b.double()).detach().abs().max()) < 0.04 * float(b.detach().abs().max())


# ------------------------------------------------------------------ what is kept, and for how long


class Kept:
    """Counts the bytes of distinct storages that autograd keeps, apart from those it is told of."""

    def __init__(self, *known):
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.found: dict[int, int] = {}

    def pack(self, t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.found[storage.data_ptr()] = storage.nbytes()
        return t

    @property
    def bytes(self):
        return sum(self.found.values())


@pytest.mark.parametrize("tokens", [4, 64])
def test_bat_keeps_nothing_for_the_backward_pass_but_x_w_and_b(tokens):
    model, _, layer = one("bat", 64, 96, (2, 32, 32), dtype=torch.float32)
    x = randn(tokens, 96, dtype=torch.float32).requires_grad_()
    kept = Kept(x, layer.base.weight, layer.D)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        model(x)
    assert kept.bytes == 0


@pytest.mark.parametrize(("variant", "most"), [("bone", 8), ("mini", 8), ("bat_row", 0), ("bat_left", 64)])
def test_other_forms_keep_the_shard_sum_or_one_output_at_most(variant, most):
    """In numbers a token: S (r) for the added forms, nothing for bat_row, h + S (o) for bat_left."""
    shapes = {"bone": (8, 64), "mini": (8, 16), "bat_row": (12, 8, 8), "bat_left": (8, 8, 8)}
    model, _, layer = one(variant, 64, 96, shapes[variant], dtype=torch.float32)
    x = randn(50, 96, dtype=torch.float32).requires_grad_()
    kept = Kept(x, layer.base.weight, layer.D)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        model(x)
    assert kept.bytes <= 4 * 50 * most


@pytest.mark.parametrize("tokens", [4, 40])
def test_a_base_written_to_before_the_backward_pass_is_refused(tokens):
    model, attached, layer = one("bat")
    y = model(randn(tokens, 24))
    attached.fold()
    with pytest.raises(RunError, match=r"the weight of .* was changed between the forward pass and its "
                                       "backward"):
        y.sum().backward()
    attached.unfold()
    y = model(randn(tokens, 24))
    with torch.no_grad():
        layer.base.weight.add_(1)
    with pytest.raises(RunError, match="call backward"):
        y.sum().backward()


def test_a_base_that_is_made_to_train_is_refused():
    model, _, layer = one("bat")
    layer.base.weight.requires_grad_(True)
    with pytest.raises(RunError, match="requires a gradient, and 'default' freezes its base"):
        model(randn(3, 24))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_the_same_gradients(variant, reentrant):
    model, _, layer = one(variant)
    x = randn(40, 24, seed=2).requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [x, layer.D])
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, want[0]) and torch.equal(layer.D.grad, want[1])


@pytest.mark.parametrize("variant", some(["bone", "bat", "bat_row"], keep=["bone", "bat_row"]))
def test_a_compiled_model_computes_the_same(variant):
    model, _, layer = one(variant)
    x = randn(40, 24, seed=2).requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [x, layer.D])
    compiled = torch.compile(model, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), [x, layer.D])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------ packed bases


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_packed_base_all_is_that_of_its_dequantized_weight(variant, tokens, chunk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    quantize_model(model, Affine(4, 8))
    W, bias = model[0].packed.get().dequantize(), model[0].bias.detach()
    attached = Bone(**options(variant, SHAPES[variant])).attach(model)
    layer = attached.layers["0"]
    with torch.no_grad():
        layer.D.copy_(0.3 * randn(*layer.D.shape, seed=1))
    x = randn(tokens, 24, seed=2, dtype=torch.float32).requires_grad_()
    got = torch.autograd.grad(y := model(x), [x, layer.D], torch.ones_like(y))
    D = layer.D.detach().clone().requires_grad_()
    want_y = forward(x, W, D, variant, bias)
    want = torch.autograd.grad(want_y, [x, D], torch.ones_like(y))
    for a, b in zip((y, *got), (want_y, *want), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    attached.fold()
    assert torch.equal(layer.base.weight, changed(W, layer.D.detach(), variant))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("variant", ["bat", "bone_free"])
def test_a_packed_base_is_dequantized_one_chunk_of_rows_at_a_time(variant, tokens, monkeypatch):
    monkeypatch.setattr(lean, "CHUNK", {"cpu": 8 * 24, "other": 8 * 24})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    quantize_model(model, Affine(4, 8))
    attached = Bone(**options(variant, SHAPES[variant])).attach(model)
    attached.layers["0"].D.data.fill_(0.1)
    kind = type(model[0].base.packed.get())
    plain, seen = kind.dequantize, []

    def dequantize(self, rows=None):
        out = plain(self, rows)
        seen.append(len(out))
        return out

    monkeypatch.setattr(kind, "dequantize", dequantize)
    model(randn(tokens, 24, dtype=torch.float32)).sum().backward()
    assert max(seen) <= 8 and len(seen) >= 4


# ------------------------------------------------------------------ dropout and scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_leaves_inputs_out_of_the_change_only(variant):
    model, _, layer = one(variant, dropout=0.4)
    x = randn(3, 24, seed=2)
    W = layer.base.weight.detach()
    change = delta(W, layer.D.detach(), variant)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    torch.manual_seed(5)
    y = model(x)
    assert torch.allclose(y, x @ W.T + layer.bias + dropped @ change.T, rtol=1e-10, atol=1e-11)
    assert torch.allclose(model.eval()(x), x @ (W + change).T + layer.bias, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("variant", ["bone", "bat", "bat_left"])
def test_dropout_is_right_on_average(variant):
    model, _, _ = one(variant, dropout=0.25)
    x = randn(1, 24, seed=2)
    torch.manual_seed(0)
    mean = model(x.repeat(20_000, 1)).mean(0)
    want = model.eval()(x)[0]
    spread = model.train()(x.repeat(20_000, 1)).std(0) / 20_000**0.5
    assert bool(((mean - want).abs() < 5 * spread + 1e-12).all())


@pytest.mark.parametrize(("variant", "shape"), [("bone", (6, 16)), ("mini", (6, 8))])
def test_row_norm_makes_the_tiling_rows_unit_vectors(variant, shape):
    model, _, layer = one(variant, shape=shape, scale=1.0)
    x = randn(5, 24, seed=2)
    plain = model(x) - layer.base(x)
    other = nn.Sequential(nn.Linear(24, 16)).double()
    scaled = Bone(**options(variant, shape), scale="row_norm").attach(other)
    inner = scaled.layers["0"]
    inner.base.load_state_dict(layer.base.state_dict())
    inner.D.data.copy_(layer.D)
    assert torch.allclose(scaled.model(x) - layer.base(x), (6 / 24) ** 0.5 * plain, rtol=1e-9)
    scaled.fold()
    assert torch.allclose(scaled.model(x) - layer.base(x), (6 / 24) ** 0.5 * plain, rtol=1e-9)


# ------------------------------------------------------------------ sizes that do not fit


@pytest.mark.parametrize(("chosen", "words"), [
    ({"variant": "bat", "r": 5}, r"bone: 0 \(16, 24\): r=5 must divide 16 and 24 in bat: 1, 2, 4, 8 would"),
    ({"variant": "bat_row", "r": 16}, "r=16 must divide 16 and 24 in bat_row: 2, 4, 8 would"),
    ({"variant": "bat_left", "r": 12}, "r=12 must divide 16 in bat_left: 2, 4, 8, 16 would"),
    ({"variant": "bone", "r": 25}, "r=25 must lie between 1 and the 24 inputs: lower r"),
    ({"variant": "bone_out", "r": 17}, "r=17 must lie between 1 and the 16 outputs: lower r"),
    ({"variant": "mini", "r": 4, "mini_r": 5}, "mini_r=5 must divide the 16 outputs"),
    ({"variant": "bone_free", "r": 8, "tiles": [3, 1]}, r"tiles=\(3, 1\) must lie between \(1, 1\) and "
                                                        r"\(2, 3\)"),
])
def test_a_block_that_does_not_fit_is_refused_with_what_would(chosen, words):
    model = nn.Sequential(nn.Linear(24, 16))
    with pytest.raises(ConfigError, match=words):
        Bone(**chosen).attach(model)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_guided_layers_can_be_copied():
    for variant in GUIDED:
        model, _, _ = one(variant)
        x = randn(40, 24, seed=2)
        again = copy.deepcopy(model)
        assert torch.equal(again(x), model(x))
        again[0].D.data.zero_()
        assert not torch.equal(again(x), model(x))


@pytest.mark.parametrize("turned", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_weight_folded_in_pieces_is_the_changed_one_and_comes_back(variant, dtype, turned, monkeypatch):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D if turned else None
    model = nn.Sequential(conv1d(16, 24) if conv1d else nn.Linear(24, 16)).to(dtype)
    attached = Bone(**options(variant, SHAPES[variant])).attach(model)
    layer = attached.layers["0"]
    with torch.no_grad():
        layer.D.copy_(0.3 * randn(*layer.D.shape, seed=1))
    before = layer.weight_beneath.read().clone()
    want = changed(before, layer.D, variant)
    fingerprints = []
    for budget in (1, 100, 1 << 20):
        monkeypatch.setattr(adapted, "_PIECE", {"cpu": budget, "other": budget})
        attached.fold()
        after = layer.weight_beneath.read()
        assert torch.allclose(after.double(), want.double(), rtol=1e-5 if dtype is torch.float32 else 2e-2)
        fingerprints.append(adapted._fingerprint(after))
        assert layer.untouched
        after[3:5] = after[[4, 3]]  # the same numbers in another order
        assert not layer.untouched
        after[3:5] = after[[4, 3]]
        attached.unfold()
        assert torch.equal(layer.weight_beneath.read(), before)
    assert torch.equal(fingerprints[1], fingerprints[2]) or variant in GUIDED  # the pieces round alike


def test_a_fold_that_fails_in_a_later_piece_leaves_the_weight(monkeypatch):
    monkeypatch.setattr(adapted, "_PIECE", {"cpu": 1, "other": 1})
    _, attached, layer = one("bat")
    before, write = layer.weight_beneath.read().clone(), layer.change_into

    def fails(out, W, first):
        write(out, W, first)
        if first:
            raise KeyboardInterrupt

    layer.change_into = fails
    with pytest.raises(KeyboardInterrupt):
        attached.fold()
    assert torch.equal(layer.weight_beneath.read(), before) and not attached.folded


# ------------------------------------------------------------------ what another trial had found


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_rounds_no_weight_that_is_folded_and_no_block(variant):
    _, attached, layer = one(variant, dtype=torch.float32)
    W, D = layer.base.weight.detach().clone(), layer.D.detach().clone()
    want, composed = changed(W, D, variant), compose(D, D, variant)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(changed(W, D, variant), want) and torch.equal(compose(D, D, variant), composed)
        assert torch.equal(layer.folded_weight(), want)
        attached.fold()
    assert torch.equal(layer.base.weight, want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [2, 70])
def test_inputs_of_other_types_are_torchs_own_error_or_taken_as_a_linear_takes_them(variant, tokens):
    model, _, _ = one(variant, dtype=torch.float32)
    for dtype in (torch.long, torch.float16, torch.float64):
        with pytest.raises(RuntimeError):
            model(torch.ones(tokens, 24, dtype=dtype))
    Bone(**options(variant, SHAPES[variant])).attach(model, "above").layers["0"].D.data.fill_(0.1)
    for dtype in (torch.long, torch.float16):
        with pytest.raises(RuntimeError):
            model(torch.ones(tokens, 24, dtype=dtype))
    model, _, _ = one(variant)
    x = randn(tokens, 24, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), model[0].product(x)) and model(x).dtype == torch.float64


@pytest.mark.parametrize("variant", ["bat", "bone_free"])
def test_dropout_beneath_acts_and_its_gradients_are_those_of_the_product(variant, chunk):
    model, _, under = one("bone", dropout=0.5)
    above = Bone(**options(variant, SHAPES[variant])).attach(model, "above").layers["0"]
    x, W, bias = randn(70, 24, seed=2), under.base.weight.detach(), under.bias.detach()
    for scale in (0.0, 0.3):
        with torch.no_grad():
            above.D.copy_(scale * randn(*above.D.shape, seed=3))
        U, D = (t.detach().clone().requires_grad_() for t in (under.D, above.D))
        torch.manual_seed(5)
        below = x @ W.T + bias + F.dropout(x, 0.5) @ delta(W, U, "bone").T
        want = below + x @ delta(changed(W, U, "bone"), D, variant).T
        torch.manual_seed(5)
        got = model.train()(x)
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)
        dy = randn(*got.shape, seed=4)
        ours = torch.autograd.grad(got, [under.D, above.D], dy)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9)
                   for a, b in zip(ours, torch.autograd.grad(want, [U, D], dy), strict=True))


def test_a_weight_that_cannot_be_written_to_is_named_before_anything_is_folded():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(16, 16))
    model[1].weight = nn.Parameter(torch.randn(16).expand(16, 16))
    attached = Bone(r=8).attach(model)
    before = model[0].base.weight.clone()
    with pytest.raises(ConfigError, match="1 is expanded: many of its numbers are one in memory: give it"):
        attached.fold()
    assert torch.equal(model[0].base.weight, before) and not attached.folded
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8))
        with pytest.raises(ConfigError, match="cannot train: attach outside it"):
            Bone(r=8).attach(model)
    with pytest.raises(ConfigError, match=r"was made in torch\.inference_mode"):
        Bone(r=8).attach(model).fold()
    with pytest.raises(ConfigError, match="scale=inf is not allowed"):
        Bone(scale=float("inf"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_block_with_dropout_changes_nothing_in_training(variant, chunk):
    """A product of parts once stood for a change that is zero, and doubled the output."""
    model, _, layer = one(variant, dropout=0.5)
    with torch.no_grad():
        layer.D.zero_()
    x = randn(70, 24, seed=2)
    want = F.linear(x, layer.base.weight, layer.bias)
    assert torch.allclose(model.train()(x), want, rtol=1e-12, atol=1e-12)
