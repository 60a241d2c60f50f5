"""A kit is worth something when it refuses: each fault below is planted, and must be named."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from poise.errors import ConfigError
from poise.interfaces import Arrays, Example, Splits
from poise.models.components import MLP, CausalLM
from poise.models.serving import InMemory
from poise.models.tokenizers import ByteTokenizer
from poise.quantizers import AbsMax
from poise.testing import (
    ContractError,
    check_adapter,
    check_aggregator,
    check_data,
    check_model,
    check_quantizer,
)
from poise.testing.aggregator import sample
from poise.testing.lowrank import LowRank
from poise_bone import Bone
from poise_bone.layers import BoneLayer
from poise_compander import WeightCompander
from poise_quantagg.aggregators.fitted import LinearFit
from poise_quantagg.components import Average, LocalCoarse


def planted(*faults):
    """Parametrize over (name, fault, words of the message)."""
    return pytest.mark.parametrize(
        ("fault", "words"), [pytest.param(f, w, id=n) for n, f, w in faults])


class Wrapped:
    """Another object with some of its attributes replaced."""

    def __init__(self, real, **replaced):
        self.__dict__.update(replaced)
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)


# ------------------------------------------------------------------ adapter


class FaultyAdapter:
    """An adapter with a fault planted into what it attaches."""

    def __init__(self, plant, real=None):
        self.plant, self.real = plant, real or Bone(r=4)
        self.freezes_base = self.real.freezes_base

    def attach(self, model, name="default"):
        attached = self.real.attach(model, name)
        return self.plant(attached) or attached


def first(attached):
    return next(iter(attached.layers.values()))


def changes_the_output(attached):
    list(attached.layers.values())[-1].D.data.fill_(0.1)


def renames(attached):
    attached.model[3] = nn.Sequential(attached.model[3])


def reports_a_tensor(attached):
    attached.report = lambda: {"change": torch.zeros(2)}


def trains_nothing(attached):
    attached.trainable = lambda: [{"params": []}]


def trains_a_frozen_tensor(attached):
    attached.trainable = lambda: [{"params": [first(attached).base.weight]}]


def leaves_the_norm_trainable(attached):
    attached.model[1].requires_grad_(True)


def forgets_a_layer(attached):
    attached.optimizer = lambda cls, **options: cls([first(attached).D], **options)


def returns_no_optimizer(attached):
    attached.optimizer = lambda cls, **options: object()


def moves(parameter_of):
    """Return a fault whose optimizer pushes a parameter it must not touch."""

    def plant(attached):
        real = attached.optimizer

        def optimizer(cls, **options):
            made = real(cls, **options)
            made.register_step_post_hook(lambda *_: parameter_of(attached).data.add_(1e-3))
            return made

        attached.optimizer = optimizer

    return plant


def never_steps(attached):
    real = attached.optimizer

    def optimizer(cls, **options):
        made = real(cls, **options)
        made.step = lambda *_: None
        return made

    attached.optimizer = optimizer


def ignores_options(attached):
    real = attached.optimizer
    attached.optimizer = lambda cls, **options: real(cls, lr=options["lr"])


def loads_a_part(attached):
    def load(tensors):
        for key, tensor in attached.state_dict().items():
            if key in tensors:
                tensor.copy_(tensors[key])

    attached.load_state_dict = load


def changes_before_it_refuses(attached):
    real = attached.load_state_dict

    def load(tensors):
        next(iter(attached.state_dict().values())).add_(1)
        real(tensors)

    attached.load_state_dict = load


def folds_twice(attached):
    """Each fold adds the change again."""
    def fold():
        for layer in attached.layers.values():
            layer._before = ()
            layer.fold()

    attached.fold = fold


def unfolds_without_fold(attached):
    real = attached.unfold

    def unfold():
        if not attached.folded:
            for layer in attached.layers.values():
                layer.weight_beneath.write(layer.weight_beneath.read() - layer.changed(layer.beneath()))
        real()

    attached.unfold = unfold


def streams_twice(attached):
    real = attached.folded_weights
    attached.folded_weights = lambda: [*real(), next(iter(real()))]


def cuts_names(attached):
    """What the tutorial taught: a layer named `database` or `base` loses its name."""
    def folded_weights():
        state = attached.model.state_dict()
        changed = {f"{n}.weight": x.folded_weight() for n, x in attached.layers.items()}
        for key, tensor in state.items():
            plain = key.replace("base.", "")
            if not plain.endswith(".D"):
                yield plain, changed.get(plain, tensor)

    attached.folded_weights = folded_weights
    attached.folded_state_dict = lambda: dict(folded_weights())


def leaves_the_base_frozen(attached):
    real = attached.detach

    def detach():
        return real().requires_grad_(False)

    attached.detach = detach


def merges_into_nothing(attached):
    real = attached.detach
    attached.merge = real


def keeps_its_layers(attached):
    def merge():
        attached.fold()
        return attached.model.requires_grad_(True)

    attached.merge = merge


def leaves_a_hook(attached):
    real = attached.merge

    def merge():
        model = real()
        model[0].register_forward_hook(lambda *_: None)
        return model

    attached.merge = merge


def cannot_be_disabled(attached):
    attached.disable = contextlib.nullcontext


def stays_disabled(attached):
    def disable():
        attached.active = False
        return contextlib.nullcontext()

    attached.disable = disable


def detaches_all(attached):
    real = attached.detach

    def detach():
        for layer in attached.layers.values():
            if hasattr(layer.base, "D"):
                layer.base.D.data.zero_()
        return real()

    attached.detach = detach


def loses_a_layer(attached):
    full = attached.state_dict
    kept = next(iter(full()))
    attached.state_dict = lambda: {kept: full()[kept]}
    attached.load_state_dict = lambda tensors: [full()[k].copy_(t) for k, t in tensors.items()]


def saves_nothing(attached):
    attached.state_dict = dict


def folds_too_much(attached):
    real = attached.fold

    def fold():
        real()
        first(attached).base.weight.data.mul_(1.01)

    attached.fold = fold


def never_unfolds(attached):
    attached.unfold = lambda: None


def unfolds_by_rounding(attached):
    def unfold():
        for layer in attached.layers.values() if attached.folded else ():
            layer.unfold()
            layer.base.weight.data = layer.base.weight.data.half().float()

    attached.unfold = unfold


def saves_its_own_names(attached):
    attached.folded_state_dict = attached.model.state_dict


def saves_the_base(attached):
    real = attached.folded_state_dict
    attached.folded_state_dict = lambda: {
        **real(), "0.weight": first(attached).base.weight.detach()}


def folds_the_live_model(attached):
    real = attached.folded_state_dict

    def folded():
        plain = real()
        attached.fold()
        return plain

    attached.folded_state_dict = folded


def stays_on_detach(attached):
    attached.detach = lambda: attached.model


def folds_on_detach(attached):
    real = attached.detach

    def detach():
        plain = {k: v.clone() for k, v in attached.folded_state_dict().items()}
        model = real()
        model.load_state_dict(plain)
        return model

    attached.detach = detach


def lacks_methods(attached):
    kept = ("model", "name", "adapter", "active", "disable", "trainable", "optimizer", "fold", "merge",
            "folded_weights", "state_dict", "load_state_dict", "detach", "report")
    return SimpleNamespace(**{n: getattr(attached, n) for n in kept})


@planted(
    ("output", changes_the_output, "attach changes the output"),
    ("names", renames, "attach changes the names"),
    ("report", reports_a_tensor, r"report\(\) holds what JSON cannot"),
    ("empty", trains_nothing, r"trainable\(\) is empty"),
    ("frozen", trains_a_frozen_tensor, "does not require a gradient"),
    ("loose", leaves_the_norm_trainable, r"outside trainable\(\) require gradients"),
    ("left out", forgets_a_layer, "leaves out trainable parameters"),
    ("no optimizer", returns_no_optimizer, "no torch optimizer"),
    ("moves base", moves(lambda a: first(a).base.weight), "0.base.weight moves"),
    ("moves norm", moves(lambda a: a.model[1].weight), "1.weight moves"),
    ("still", never_steps, "training does not change the output"),
    ("loses", loses_a_layer, "load_state_dict accepts a part of it"),
    ("saves nothing", saves_nothing, r"state_dict\(\) is empty"),
    ("fold", folds_too_much, "fold changes the output"),
    ("no unfold", never_unfolds, "unfold does not restore"),
    ("unfold rounds", unfolds_by_rounding, "unfold does not restore"),
    ("checkpoint names", saves_its_own_names, "no plain checkpoint"),
    ("checkpoint values", saves_the_base, "the folded checkpoint gives another output"),
    ("checkpoint folds", folds_the_live_model, "changes the live model"),
    ("stays", stays_on_detach, "detach does not give a plain model back"),
    ("detach folds", folds_on_detach, "detach does not restore the frozen base"),
    ("methods", lacks_methods, "what attach returns lacks unfold, folded_state_dict"),
    ("options", ignores_options, r"optimizer\(\) ignores its options"),
    ("part", loads_a_part, "load_state_dict accepts a part of it"),
    ("torn load", changes_before_it_refuses, "refuses a part of it, and has changed tensors before"),
    ("fold twice", folds_twice, "a second fold changes the weights"),
    ("unfold first", unfolds_without_fold, "unfold without fold changes the output"),
    ("stream", streams_twice, r"folded_weights\(\) does not yield what .* each key once"),
    ("key surgery", cuts_names, "layers named base, database, original, D lose their names"),
    ("base frozen", leaves_the_base_frozen, "detach leaves requires_grad of 0.weight"),
    ("merges nothing", merges_into_nothing, "merge changes the output"),
    ("layers left", keeps_its_layers, "merge leaves layers behind"),
    ("hook left", leaves_a_hook, "merge leaves forward hooks behind"),
    ("always acts", cannot_be_disabled, r"active is not False within disable\(\)"),
    ("stays off", stays_disabled, r"does not act again after disable\(\)"),
    ("harms others", detaches_all, "detaching one adapter changes what another does"),
)
def test_a_faulty_adapter_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_adapter(FaultyAdapter(fault))


def test_a_second_adapter_that_takes_the_place_of_the_first_is_refused():
    class Replaces(FaultyAdapter):
        def attach(self, model, name="default"):
            for layer in [m for m in model.modules() if isinstance(m, BoneLayer)]:
                layer.D.data.zero_()
            return super().attach(model, name)

    with pytest.raises(ContractError, match="a second adapter does not act beside the first"):
        check_adapter(Replaces(lambda attached: None))


def test_a_reparameterisation_that_is_not_alone_is_refused():
    class Shares(FaultyAdapter):
        def attach(self, model, name="default"):
            try:
                return super().attach(model, name)
            except ConfigError:
                if name == "default":
                    raise
                return SimpleNamespace()

    for plant, words in (
        (lambda attached: None, "a second adapter on weights that this one holds alone"),
        (cannot_be_disabled, r"disable\(\) is accepted"),
        (Wrapped, "active = False is accepted"),
    ):
        with pytest.raises(ContractError, match=words):
            check_adapter(Shares(plant, WeightCompander()))


def test_the_kits_say_what_they_checked():
    held = check_adapter(WeightCompander())
    assert held[-1] == "holds its weights alone" and "switching off and on" not in held
    freezing = check_adapter(Bone(r=4))
    assert freezing[-2:] == ["switching off and on", "several adapters"] and "adapter files" in freezing
    assert "adapter files" not in check_adapter(LowRank())  # a class of no entry
    assert "levels stay" in check_quantizer(AbsMax(4, 8)) and "trains" in check_model(
        MLP(in_features=4, classes=2, hidden=[4]), "classification")
    assert "no row in two splits" in check_data(Rows())


def test_an_adapter_that_matches_nothing_must_say_so():
    class AcceptsAnything(FaultyAdapter):
        def attach(self, model, name="default"):
            try:
                return super().attach(model, name)
            except ConfigError:
                return SimpleNamespace(model=model)

    with pytest.raises(ContractError, match="without a matching layer is accepted"):
        check_adapter(AcceptsAnything(lambda attached: None))


def test_an_adapter_must_refuse_in_poises_own_words():
    class RaisesValueError(FaultyAdapter):
        def attach(self, model, name="default"):
            raise ValueError("nothing matches")

    with pytest.raises(ContractError, match="it raises ValueError instead"):
        check_adapter(RaisesValueError(lambda attached: None))


def test_a_reparameterisation_that_forgets_its_training_is_refused():
    def plant(attached):
        start = {k: v.clone() for k, v in attached.folded_state_dict().items()}
        real = attached.detach

        def detach():
            model = real()
            model.load_state_dict(start)
            return model

        attached.detach = detach

    with pytest.raises(ContractError, match="detach changes the output of a reparameterised"):
        check_adapter(FaultyAdapter(plant, WeightCompander()))


def test_a_reparameterisation_that_leaves_biases_out_is_refused():
    def plant(attached):
        attached.optimizer = lambda cls, **options: cls(attached.trainable()[:1], **options)

    with pytest.raises(ContractError, match="leaves out trainable parameters"):
        check_adapter(FaultyAdapter(plant, WeightCompander()))


# ------------------------------------------------------------------ quantizer


class FaultyQuantizer:
    """Absmax with a fault planted into what it stores."""

    real = AbsMax(bits=4, group=8)

    def __init__(self, **replaced):
        self.replaced = replaced

    def quantize(self, weight):
        stored = self.real.quantize(weight)
        return Wrapped(stored, **{
            k: (lambda *args, v=v: v(stored, *args)) if callable(v) else v
            for k, v in self.replaced.items()
        })

    def from_tensors(self, tensors, shape, dtype):
        return self.real.from_tensors(tensors, shape, dtype)

    def at(self, bits):
        return self.real.at(bits)

    def layout(self, shape, dtype):
        return self.real.layout(shape, dtype)


def shifted_rows(stored, rows=None):
    dense = stored.dequantize()
    return dense if rows is None else dense.roll(1, 0)[rows]


@planted(
    ("bytes", {"nbytes": 100}, "nbytes lies: it says 100"),
    ("bits", {"bits_per_weight": 4.0}, r"bits_per_weight is 4.0, its tensors take 6.0"),
    ("shape", {"shape": (40, 24)}, r"shape is \(40, 24\)"),
    ("rows", {"dequantize": shifted_rows}, "differs from those rows of the whole"),
    ("zeros", {"dequantize": lambda s, r=slice(None): torch.zeros(s.shape)[r]}, "no better than zeros"),
    ("NaN", {"dequantize": lambda s, r=slice(None): s.dequantize(r) / 0}, "holds NaN or Inf"),
    ("dtype", {"dequantize": lambda s, r=slice(None): s.dequantize(r).double()}, "another dtype"),
    ("transposed", {"dequantize": lambda s, r=slice(None): s.dequantize(r).T}, "another shape"),
    ("matmul", {"matmul": lambda s, x: 1.001 * s.matmul(x)}, r"matmul\(x\) differs"),
    ("matmul_t", {"matmul_t": lambda s, y: s.matmul_t(y.flip(-1))}, r"matmul_t\(dy\) differs"),
    ("product shape", {"matmul": lambda s, x: s.matmul(x)[..., :-1]}, r"matmul\(x\) has shape"),
)
def test_a_faulty_quantized_tensor_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_quantizer(FaultyQuantizer(**fault))


class Rerolls(FaultyQuantizer):
    draws = 0

    def quantize(self, weight):
        self.draws += 1
        return self.real.quantize(weight + 0.1 * self.draws)


class AcceptsNaN(FaultyQuantizer):
    def quantize(self, weight):
        return self.real.quantize(weight.nan_to_num(nan=0.0))


class AcceptsInf(FaultyQuantizer):
    def quantize(self, weight):
        return self.real.quantize(torch.where(weight.isinf(), 0.0, weight))


class RaisesValueError(FaultyQuantizer):
    def quantize(self, weight):
        if not weight.isfinite().all():
            raise ValueError("not finite")
        return self.real.quantize(weight)


class ForgetsTheScale(FaultyQuantizer):
    def from_tensors(self, tensors, shape, dtype):
        ones = torch.ones_like(tensors["scale"])
        return self.real.from_tensors({**tensors, "scale": ones}, shape, dtype)


class CodebookIsOff(FaultyQuantizer):
    """Codes are chosen for other levels than they stand for."""

    def quantize(self, weight):
        return self.real.quantize(1.05 * weight)


class SearchesElsewhere(FaultyQuantizer):
    """It says that it searches for levels, and finds none that fit."""

    searches = True

    def quantize(self, weight):
        return self.real.quantize(0.9 * weight)


class IsAnAlias(FaultyQuantizer):
    def quantize(self, weight):
        self.real.quantize(weight)
        return Wrapped(self.real.quantize(weight), dequantize=lambda rows=None: (
            self.real.quantize(weight).dequantize(rows)))


class ForgetsTheDtype(FaultyQuantizer):
    def quantize(self, weight):
        return self.real.quantize(weight.float())


class FixedFormat(FaultyQuantizer):
    """Four bits and no others, which a TypeError says."""

    def at(self, bits):
        return dataclasses.replace(self.real, bits=bits, width=4)


class AnyBits(FaultyQuantizer):
    def at(self, bits):
        return self.real


class ScaleFollowsTheData(FaultyQuantizer):
    """The fault of old: float32 scales where float16 does not hold them."""

    def quantize(self, weight):
        wide = bool(weight.abs().max() > 2)
        return dataclasses.replace(self.real, scale_dtype="float32" if wide else "float16").quantize(weight)

    def from_tensors(self, tensors, shape, dtype):
        kind = str(tensors["scale"].dtype).removeprefix("torch.")
        return dataclasses.replace(self.real, scale_dtype=kind).from_tensors(tensors, shape, dtype)


class StoresNothing(FaultyQuantizer):
    def quantize(self, weight):
        return weight


@planted(
    ("random", Rerolls, "quantizing the same weight twice differs"),
    ("NaN", AcceptsNaN, "a weight that holds nan is accepted"),
    ("Inf", AcceptsInf, "a weight that holds inf is accepted"),
    ("ValueError", RaisesValueError, "raises ValueError instead"),
    ("from_tensors", ForgetsTheScale, r"from_tensors\(tensors\(\)\) dequantizes differently"),
    ("methods", StoresNothing, "the quantized tensor lacks resident_bytes, bits_per_weight"),
    ("codebook", CodebookIsOff, "quantizing what was quantized moves it"),
    ("search", SearchesElsewhere, "errs by 0.[0-9]+ of the first error"),
    ("alias", IsAnAlias, "it changes with the weight that it was made from"),
    ("dtype lost", ForgetsTheDtype, "a weight of torch.bfloat16 comes back as torch.float32"),
    ("fixed", FixedFormat, "raises TypeError instead of one of Poise's errors"),
    ("any bits", AnyBits, r"at\(-1\) is accepted"),
    ("layout", ScaleFollowsTheData, r"layout\(\(24, 40\)\) says .*, quantize makes"),
)
def test_a_faulty_quantizer_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_quantizer(fault())


# ------------------------------------------------------------------ aggregator


class FaultyAggregator:
    """The average, with another prediction, other weights or another fit."""

    def __init__(self, **replaced):
        self.replaced = replaced

    def fit(self, Z, y, X=None, *, levels=None, validation=None, sample_weight=None):
        fitted = Average().fit(Z, y, levels=levels, sample_weight=sample_weight)
        return Wrapped(fitted, **{
            k: (lambda *args, v=v: v(fitted, *args)) if callable(v) else v
            for k, v in self.replaced.items()
        })


def plus(extra):
    return lambda fitted, Z, X: fitted.predict(Z) + extra(Z)


@planted(
    ("order", {"predict": lambda f, Z, X: f.predict(Z)[:, ::-1]}, "the level order is ignored"),
    ("shape", {"predict": lambda f, Z, X: f.predict(Z).T}, r"predict has shape \(5, 80\)"),
    ("NaN", {"predict": lambda f, Z, X: f.predict(Z) * np.nan}, "holds NaN or Inf"),
    ("weights", {"weights": lambda f, X: 2 * f.weights()}, r"not the sum of weights\(\) times Z"),
    ("weights shape", {"weights": lambda f, X: np.ones(7)},
     r"weights\(\) has shape \(7,\), not \(p\), \(p, m\) or \(p, m, m\)"),
    ("position", {"linear": False, "predict": plus(lambda Z: np.arange(len(Z))[:, None])},
     "depends on the other rows"),
    ("batch", {"linear": False, "predict": plus(lambda Z: Z.mean() - Z.mean((1, 2))[:, None])},
     "depends on the other rows"),
    ("offset", {"linear": False, "predict": plus(lambda Z: 1.0)}, "not affine equivariant"),
    ("first model", {"linear": False, "predict": lambda f, Z, X: f.predict(Z) * 0 + Z[:, 0]},
     "depends on the order of the models"),
    ("fewer levels", {"predict": lambda f, Z, X: Z.mean(1)}, "another number of levels"),
)
def test_a_faulty_fitted_aggregator_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_aggregator(FaultyAggregator(**fault))


class Mutates(FaultyAggregator):
    def fit(self, Z, y, X=None, **options):
        fitted = Average().fit(Z, y, **options)
        y -= y.mean()
        return fitted


class Rerandomizes(FaultyAggregator):
    draws = 0

    def fit(self, Z, y, X=None, **options):
        self.draws += 1
        w = np.array([0.2, 0.3, 0.5]) ** self.draws
        return LinearFit(w / w.sum(), Z.shape[2])


class WeighsOnes(FaultyAggregator):
    def fit(self, Z, y, X=None, *, sample_weight=None, **options):
        w = np.array([1.0, 1.0, 1.0]) if sample_weight is None else np.array([2.0, 1.0, 1.0])
        return LinearFit(w / w.sum(), Z.shape[2])


class AcceptsFewerModels(FaultyAggregator):
    def fit(self, Z, y, X=None, **options):
        fitted = Average().fit(Z, y, **options)

        def predict(Z, X=None):
            return fitted.predict(np.concatenate([Z, Z[:, -1:]], 1) if Z.shape[1] == 2 else Z)

        return Wrapped(fitted, predict=predict)


class AcceptsNaNPredictions(FaultyAggregator):
    def fit(self, Z, y, X=None, **options):
        return Average().fit(np.nan_to_num(Z), y, **options)


class AcceptsAnyLevels(FaultyAggregator):
    def fit(self, Z, y, X=None, *, levels=None, **options):
        return Average().fit(Z, y, levels=np.sort(levels), **options)


class AcceptsFewerTargets(FaultyAggregator):
    def fit(self, Z, y, X=None, **options):
        return Average().fit(Z, np.resize(y, len(Z)), **options)


class NoWeights(FaultyAggregator):
    def fit(self, Z, y, X=None, **options):
        return SimpleNamespace(predict=Average().fit(Z, y, **options).predict)


@planted(
    ("mutates", Mutates, "fit changes its inputs"),
    ("random", Rerandomizes, "fitting twice on the same data differs"),
    ("ones", WeighsOnes, "sample weights of one change the result"),
    ("fewer models", AcceptsFewerModels, "another number of models"),
    ("NaN", AcceptsNaNPredictions, "fit accepts NaN predictions"),
    ("levels", AcceptsAnyLevels, "fit accepts decreasing levels"),
    ("targets", AcceptsFewerTargets, "fit accepts fewer targets than rows"),
    ("methods", NoWeights, "what fit returns lacks weights"),
)
def test_a_faulty_aggregator_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_aggregator(fault())


@pytest.fixture(scope="module")
def gate():
    """Return a fitted local aggregator that nothing is wrong with, and the sample's features."""
    Z, y, X, levels = sample()
    return LOCAL.fit(Z, y, X, levels=levels), X


LOCAL = LocalCoarse(n_iter=1, width=8, depth=1, max_steps=100, patience=100)


class FaultyLocal:
    """A local aggregator that is fitted once, with replaced methods of what fit returns."""

    needs_features = True

    def __init__(self, gate, **replaced):
        self.gate, self.replaced = gate, replaced

    def fit(self, Z, y, X=None, **options):
        fitted = LOCAL.fit(Z, y, X, **options)
        return Wrapped(fitted, **{
            k: (lambda *args, v=v: v(fitted, self.gate[1], *args)) for k, v in self.replaced.items()
        })


def equal(fitted):
    return Average().fit(np.zeros((1, fitted.p, fitted.m)), np.zeros(1))


@planted(
    ("ignores", {"predict": lambda f, own, Z, X=None: equal(f).predict(Z),
                 "weights": lambda f, own, X=None: np.full((len(X), f.p), 1 / f.p)},
     "the features are ignored: every row has the same weights"),
    ("no leading axis", {"weights": lambda f, own, X=None: f.weights(X)[0]},
     r"weights\(X\) has shape \(3,\)"),
    ("other weights", {"weights": lambda f, own, X=None: f.weights(X)[::-1]},
     r"not the sum of weights\(X\) times Z"),
    ("remembers", {"predict": lambda f, own, Z, X=None: f.predict(Z, own[: len(Z)])},
     "depends on the other rows"),
    ("forgives predict", {"predict": lambda f, own, Z, X=None: f.predict(Z, own if X is None else X)},
     "predict accepts missing features"),
    ("forgives weights", {"weights": lambda f, own, X=None: f.weights(own if X is None else X)},
     "weights accepts missing features"),
    ("pads rows", {"predict": lambda f, own, Z, X=None: f.predict(
        Z, X if X is None else np.resize(X, (len(Z), X.shape[1])))},
     "accepts features of fewer rows"),
    ("pads columns", {"predict": lambda f, own, Z, X=None: f.predict(
        Z, np.column_stack([X, X])[:, :2] if X is not None and X.shape[1] == 1 else X)},
     "another number of features"),
)
def test_a_faulty_local_aggregator_is_refused(fault, words, gate):
    with pytest.raises(ContractError, match=words):
        check_aggregator(FaultyLocal(gate, **fault))


class FitsWithoutFeatures(FaultyLocal):
    def fit(self, Z, y, X=None, **options):
        return LOCAL.fit(Z, y, self.gate[1] if X is None else X, **options)


class FitsNaNFeatures(FaultyLocal):
    def fit(self, Z, y, X=None, **options):
        return LOCAL.fit(Z, y, None if X is None else np.nan_to_num(X), **options)


@planted(
    ("missing", FitsWithoutFeatures, "fit accepts missing features"),
    ("NaN", FitsNaNFeatures, "fit accepts NaN features"),
)
def test_a_local_aggregator_that_fits_what_it_should_refuse_is_refused(fault, words, gate):
    with pytest.raises(ContractError, match=words):
        check_aggregator(fault(gate))


def test_the_local_aggregator_that_faults_are_planted_in_passes():
    check_aggregator(LOCAL)


# ------------------------------------------------------------------ model: causal_lm


class FaultyModel:
    """A component with another `build`, another model or another tokenizer."""

    def __init__(self, real, change=lambda model: model, tokenizer=None):
        self.real, self.change, self._tokenizer = real, change, tokenizer

    def build(self, spec=None):
        return self.change(self.real.build(spec))

    def tokenizer(self):
        return self._tokenizer or self.real.tokenizer()


LLAMA = CausalLM(architecture="LlamaForCausalLM", hidden_size=16, layers=1)


def output(change):
    """Return a model change that alters the logits by a function."""

    def change_model(model):
        real = model.forward
        model.forward = lambda **inputs: SimpleNamespace(logits=change(real(**inputs).logits))
        return model

    return change_model


class Reseeds(FaultyModel):
    builds = 0

    def build(self, spec=None):
        self.builds += 1
        torch.manual_seed(self.builds)
        return self.real.build(spec)


def tokens(**replaced):
    return Wrapped(LLAMA.tokenizer(), **replaced)


def hides_a_matrix(model):
    """Claim to wrap a base, as adapters do, with a matrix beside it that the walk then skips."""
    model.extra = nn.Linear(3, 3)
    model.extra.held_weights = lambda path: []
    return model


@planted(
    ("looks ahead", FaultyModel(LLAMA, output(lambda y: y + y.mean(1, keepdim=True))), "not causal"),
    ("one time short", FaultyModel(LLAMA, output(lambda y: y[:, :-1])), "not \\(batch, time, vocab\\)"),
    ("lossy", FaultyModel(LLAMA, tokenizer=tokens(encode=lambda t: list(t.lower().encode()))),
     "does not decode what it encodes"),
    ("no end", FaultyModel(LLAMA, tokenizer=tokens(eos_id=None)), "no end token"),
    ("too many ids", FaultyModel(LLAMA, tokenizer=tokens(eos_id=257)), "ids beyond the vocabulary"),
    ("random", Reseeds(LLAMA), "building twice from the same seed"),
    ("no gradient", FaultyModel(LLAMA, output(lambda y: y.detach())), "no parameter gets a gradient"),
    ("hidden matrix", FaultyModel(LLAMA, hides_a_matrix), "the walk meets"),
    ("no tokenizer", SimpleNamespace(build=LLAMA.build), "component lacks tokenizer"),
)
def test_a_faulty_language_model_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_model(fault, "causal_lm")


# ------------------------------------------------------------------ model: classification


PLAIN = MLP(in_features=6, classes=3, hidden=[4])


def after(change):
    def change_model(model):
        real = model.forward
        model.forward = lambda x: change(real(x))
        return model

    return change_model


@planted(
    ("batch", FaultyModel(PLAIN, after(lambda y: y - y.mean(0))), "depends on the batch"),
    ("three axes", FaultyModel(PLAIN, after(lambda y: y[..., None])),
     r"\(batch, classes\), not \(5, 3, 1\)"),
    ("one row", FaultyModel(PLAIN, after(lambda y: y[:1])), r"\(batch, classes\), not \(1, 3\)"),
    ("random", Reseeds(PLAIN), "building twice from the same seed"),
    ("no gradient", FaultyModel(PLAIN, after(lambda y: y.detach())), "no parameter gets a gradient"),
    ("no build", SimpleNamespace(), "the model component lacks build"),
)
def test_a_faulty_classifier_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_model(fault, "classification")


# ------------------------------------------------------------------ model: quantile


class Quantiles:
    """Least squares for the centre, the residuals' quantiles around it."""

    levels = np.array([0.1, 0.3, 0.5, 0.7, 0.9])

    def fit(self, X, y, sample_weight=None):
        self.beta = np.linalg.lstsq(X, y, rcond=None)[0]
        self.spread = np.quantile(y - X @ self.beta, np.sort(self.levels))
        return self

    def predict_quantiles(self, X, levels=None):
        if X.shape[1] != len(self.beta):
            raise ConfigError("another number of columns")
        return (X @ self.beta)[:, None] + self.spread


class Unsorted(Quantiles):
    levels = Quantiles.levels[::-1]


class Reversed(Quantiles):
    def predict_quantiles(self, X, levels=None):
        return super().predict_quantiles(X)[:, ::-1]


class Crossing(Quantiles):
    def predict_quantiles(self, X, levels=None):
        return super().predict_quantiles(X)[:, [0, 3, 2, 1, 4]]


class OneLevelShort(Quantiles):
    def predict_quantiles(self, X, levels=None):
        return super().predict_quantiles(X)[:, 1:]


class NotFinite(Quantiles):
    def predict_quantiles(self, X, levels=None):
        return super().predict_quantiles(X) * np.inf


class Drifts(Quantiles):
    fits = 0

    def fit(self, X, y, sample_weight=None):
        Drifts.fits += 1
        super().fit(X, y)
        self.spread = self.spread + 1e-3 * Drifts.fits
        return self


class Useless(Quantiles):
    def predict_quantiles(self, X, levels=None):
        return -super().predict_quantiles(X) + 2 * self.spread


class AnyColumns(Quantiles):
    def predict_quantiles(self, X, levels=None):
        return super().predict_quantiles(np.resize(X, (len(X), len(self.beta))) if X.shape[1] < 3 else X)


def test_the_quantile_model_without_fault_passes():
    check_model(SimpleNamespace(build=Quantiles, form="quantile"), "quantile")
    with pytest.raises(ContractError, match="form is 'neural', and the task quantile takes 'quantile'"):
        check_model(SimpleNamespace(build=Quantiles), "quantile")


@planted(
    ("unsorted", Unsorted, "levels do not increase"),
    ("reversed", Reversed, "the level order is ignored"),
    ("crossing", Crossing, "the level order is ignored"),
    ("shape", OneLevelShort, r"predict_quantiles has shape \(120, 4\)"),
    ("finite", NotFinite, "holds NaN or Inf"),
    ("drifts", Drifts, "fitting twice on the same data differs"),
    ("useless", Useless, "no better than a constant"),
    ("columns", AnyColumns, "another number of columns is accepted"),
    ("methods", SimpleNamespace, "a quantile model lacks levels, fit, predict_quantiles"),
)
def test_a_faulty_quantile_model_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_model(SimpleNamespace(build=fault, form="quantile"), "quantile")


class ServedModel:
    """A served language model in memory, as a component."""

    form = "served"

    def build(self, spec=None):
        torch.manual_seed(0)
        return InMemory(LLAMA.build(), ByteTokenizer())

    def tokenizer(self):
        return ByteTokenizer()


class Wanders(ServedModel):
    builds = 0

    def build(self, spec=None):
        self.builds += 1
        served = super().build()
        served.model.lm_head.weight.data.mul_(self.builds)
        return served


def test_a_served_model_is_held_against_a_second_one():
    found = check_model(ServedModel(), "serving")
    assert found[:2] == ["tokenizer", "logits"] and found[-1] == "closes"
    with pytest.raises(ContractError, match="logits are not those of the model in memory"):
        check_model(Wanders(), "serving")
    with pytest.raises(ContractError, match="form is 'neural', and the task serving takes 'served'"):
        check_model(LLAMA, "serving")


def test_a_task_without_a_kit_is_named():
    with pytest.raises(ContractError, match="no kit for the task 'painting'"):
        check_model(PLAIN, "painting")


def test_what_is_planted_into_is_sound():
    check_adapter(FaultyAdapter(lambda attached: None))
    check_quantizer(FaultyQuantizer())
    check_aggregator(FaultyAggregator())
    check_model(FaultyModel(LLAMA), "causal_lm")
    check_model(FaultyModel(PLAIN), "classification")


# ------------------------------------------------------------------ data


class Rows:
    """A small table of classes, with a fault planted into its splits."""

    def __init__(self, plant=lambda splits: splits):
        self.plant = plant

    def load(self, seed=0):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)
        parts = [Arrays(x[s], y[s]) for s in (slice(0, 18), slice(18, 24), slice(24, 30))]
        spec = {"input_shape": (3,), "n_classes": 2, "columns": ["a", "b", "c"]}
        return self.plant(Splits(*parts, provenance={"source": "made up"}, spec=spec))


def changed(**parts):
    return lambda splits: dataclasses.replace(splits, **{
        k: v(splits) if callable(v) else v for k, v in parts.items()})


def of_spec(**values):
    return changed(spec=lambda s: {**s.spec, **values})


def with_x(value):
    def plant(splits):
        x = splits.test.x.copy()
        x[0, 0] = value
        return dataclasses.replace(splits, test=Arrays(x, splits.test.y))

    return plant


def shuffled(splits):
    order = np.random.default_rng().permutation(18)
    return dataclasses.replace(splits, train=Arrays(splits.train.x[order], splits.train.y[order]))


@planted(
    ("empty", changed(test=lambda s: Arrays(s.test.x[:0], s.test.y[:0])), "the test split is empty"),
    ("random", shuffled, "the same seed gives another train split"),
    ("leak", changed(test=lambda s: s.train), "18 rows lie in both the train and the test split"),
    ("one row", changed(validation=lambda s: Arrays(s.test.x[:1], s.test.y[:1])),
     "1 rows lie in both the validation and the test split"),
    ("NaN", with_x(np.nan), "1 features of the test split are NaN or Inf"),
    ("Inf", with_x(np.inf), "1 features of the test split are NaN or Inf"),
    ("label", changed(validation=lambda s: Arrays(s.validation.x, s.validation.y + 1)),
     "the validation split has labels 1 to 2, but n_classes is 2"),
    ("targets", changed(test=lambda s: Arrays(s.test.x, s.test.y[:3])), "6 rows of features and 3 targets"),
    ("shape", of_spec(input_shape=(4,)), r"spec says input_shape \(4,\), rows have shape \(3,\)"),
    ("columns", of_spec(columns=["a"]), "spec names 1 columns, rows have 3"),
    ("classes", changed(spec=lambda s: {"input_shape": (3,)}), "spec has n_classes exactly where"),
    ("provenance", changed(provenance={}), "provenance is empty"),
    ("JSON", changed(provenance={"when": np.zeros(2)}), "provenance holds what JSON cannot"),
)
def test_a_faulty_source_is_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_data(Rows(fault))


def test_a_source_that_repeats_rows_may_repeat_them_across_splits():
    def plant(splits):
        x, y = splits.train.x.copy(), splits.train.y.copy()
        x[1], y[1] = x[0], y[0]
        test = splits.test.x.copy(), splits.test.y.copy()
        test[0][0], test[1][0] = x[0], y[0]
        return dataclasses.replace(splits, train=Arrays(x, y), test=Arrays(*test))

    check_data(Rows(plant))


@pytest.mark.parametrize(("part", "words"), [
    (["text"], "holds what is no Example"),
    ([Example("question", "")], "has an example without a completion"),
])
def test_a_faulty_text_is_refused(part, words):
    fine = [[Example("", f"{name} {i}") for i in range(3)] for name in ("a", "b")]
    source = SimpleNamespace(load=lambda seed=0: Splits(*fine, part, {"source": "made up"}))
    with pytest.raises(ContractError, match=words):
        check_data(source)
