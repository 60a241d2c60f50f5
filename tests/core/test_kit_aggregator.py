"""The kit of aggregators: what it says it checked, and faults that it must name, planted one at a time."""

from __future__ import annotations

import numpy as np
import pytest

from poise.errors import MissingExtra
from poise.testing import ContractError, check_aggregator
from poise.testing.aggregator import CHECKS, FEATURE_CHECKS
from poise_quantagg.aggregators.fitted import LinearFit
from poise_quantagg.components import QRA, Average, Best, GlobalCoarse, LocalCoarse

LOCAL = LocalCoarse(n_iter=1, width=8, depth=1, max_steps=50, patience=50)


class Faulty:
    """A sound aggregator whose `fit` a subclass spoils."""

    real = GlobalCoarse()

    def fit(self, Z, y, X=None, *, levels=None, validation=None, sample_weight=None):
        return self.real.fit(Z, y, X, levels=levels, validation=validation, sample_weight=sample_weight)


class FaultyFit:
    """A fitted aggregator with some of its attributes replaced."""

    def __init__(self, fitted, **replaced):
        self.fitted = fitted
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self.fitted, name)


def planted(*faults):
    """Parametrize over (class, words of the message)."""
    return pytest.mark.parametrize(
        ("fault", "words"), [pytest.param(f, w, id=f.__name__) for f, w in faults])


# ------------------------------------------------------------------ what was checked


def test_the_kit_says_what_it_checked():
    assert check_aggregator(Average()) == list(CHECKS)
    assert check_aggregator(LOCAL) == [*CHECKS, *FEATURE_CHECKS]
    assert {"sample weights", "validation", "default levels", "refused NaN", "new rows"} <= set(CHECKS)


@pytest.mark.parametrize("real", [GlobalCoarse(), Average(), Best(), QRA()], ids=str)
def test_what_faults_are_planted_in_is_sound(real):
    sound = Faulty()
    sound.real = real
    assert check_aggregator(sound) == list(CHECKS)


def test_a_missing_package_is_no_fault_of_the_aggregator():
    class NotInstalled(Faulty):
        def fit(self, Z, y, X=None, **given):
            raise MissingExtra("it needs a package")

    with pytest.raises(MissingExtra):
        check_aggregator(NotInstalled())


# ------------------------------------------------------------------ failures


class Fails(Faulty):
    def fit(self, Z, y, X=None, **given):
        raise ZeroDivisionError("two\nlines")


class TakesNoWeights(Faulty):
    def fit(self, Z, y, X=None, *, levels=None, validation=None):
        return self.real.fit(Z, y, X, levels=levels, validation=validation)


class FailsWithUnequalWeights(Faulty):
    def fit(self, Z, y, X=None, *, sample_weight=None, **given):
        if sample_weight is not None and np.ptp(sample_weight[np.isfinite(sample_weight)]) > 2:
            raise IndexError("no such row")
        return super().fit(Z, y, X, sample_weight=sample_weight, **given)


class NotFiniteWithUnequalWeights(Faulty):
    def fit(self, Z, y, X=None, *, sample_weight=None, **given):
        fitted = super().fit(Z, y, X, sample_weight=sample_weight, **given)
        unequal = sample_weight is not None and np.ptp(sample_weight) > 0
        return LinearFit(fitted.w * np.nan, fitted.m) if unequal else fitted


class TakesNoValidation(Faulty):
    def fit(self, Z, y, X=None, *, levels=None, sample_weight=None):
        return self.real.fit(Z, y, X, levels=levels, sample_weight=sample_weight)


class FailsWithValidationAndWeights(Faulty):
    def fit(self, Z, y, X=None, *, validation=None, sample_weight=None, **given):
        if validation is not None and sample_weight is not None:
            validation = (validation[0][: len(y)], validation[1][:-1])
        return super().fit(Z, y, X, validation=validation, sample_weight=sample_weight, **given)


class FailsToPredictAfterValidation(Faulty):
    def fit(self, Z, y, X=None, *, validation=None, **given):
        fitted = super().fit(Z, y, X, validation=validation, **given)
        return fitted if validation is None else FaultyFit(fitted, predict=None)


class NeedsLevels(Faulty):
    def fit(self, Z, y, X=None, *, levels=None, **given):
        return super().fit(Z, y, X, levels=np.asarray(levels, dtype=float), **given)


@planted(
    (Fails, "^fit fails on the sample: ZeroDivisionError: two lines$"),
    (TakesNoWeights, "fit fails with sample_weight: TypeError: .*sample_weight"),
    (FailsWithUnequalWeights, "fit fails with sample_weight: IndexError: no such row"),
    (NotFiniteWithUnequalWeights, "predict (fails|holds NaN or Inf) after a fit with sample_weight"),
    (TakesNoValidation, "fit fails with validation: TypeError: .*validation"),
    (FailsWithValidationAndWeights, "fit fails with validation and sample_weight: DataError"),
    (FailsToPredictAfterValidation, "predict fails after a fit with validation: TypeError"),
    (NeedsLevels, "fit fails with levels=None"),
)
def test_a_failure_is_named_by_what_was_given(fault, words):
    with pytest.raises(ContractError, match=words):
        check_aggregator(fault())


# ------------------------------------------------------------------ sample weights, validation, levels


class CountsRowsOfWeightZero(Faulty):
    def fit(self, Z, y, X=None, *, sample_weight=None, **given):
        if sample_weight is not None and sample_weight.min() == 0 < sample_weight.max():
            sample_weight = sample_weight + 0.1 * sample_weight.max()
        return super().fit(Z, y, X, sample_weight=sample_weight, **given)


class TakesWeightsAsTheyAre(Faulty):
    def fit(self, Z, y, X=None, *, sample_weight=None, **given):
        fitted = super().fit(Z, y, X, sample_weight=sample_weight, **given)
        shrunk = 1.0 if sample_weight is None else min(1.0, 3.0 / sample_weight.max())
        return LinearFit(fitted.w * shrunk, fitted.m)


class SpoilsTheWeights(Faulty):
    def fit(self, Z, y, X=None, *, sample_weight=None, **given):
        fitted = super().fit(Z, y, X, sample_weight=sample_weight, **given)
        if sample_weight is not None:
            sample_weight /= sample_weight.sum()
        return fitted


class SpoilsTheValidation(Faulty):
    def fit(self, Z, y, X=None, *, validation=None, **given):
        fitted = super().fit(Z, y, X, validation=validation, **given)
        if validation is not None:
            validation[1][:] = 0
        return fitted


class DrawsWithValidation(Faulty):
    draws = 0

    def fit(self, Z, y, X=None, *, validation=None, **given):
        self.draws += validation is not None
        fitted = super().fit(Z, y, X, validation=validation, **given)
        return fitted if validation is None else LinearFit(fitted.w * 0.9**self.draws, fitted.m)


class ReversesWithValidation(Faulty):
    def fit(self, Z, y, X=None, *, validation=None, **given):
        fitted = super().fit(Z, y, X, validation=validation, **given)
        across = FaultyFit(fitted, predict=lambda Z, X=None: fitted.predict(Z).T)
        return fitted if validation is None else across


class OtherDefaultLevels(Faulty):
    real = QRA()

    def fit(self, Z, y, X=None, *, levels=None, **given):
        m = np.asarray(Z).shape[2]
        levels = (np.arange(m) + 0.5) / m if levels is None else levels
        return super().fit(Z, y, X, levels=levels, **given)


@planted(
    (CountsRowsOfWeightZero, "rows of weight zero change the result"),
    (TakesWeightsAsTheyAre, "three times the sample weights change the result"),
    (SpoilsTheWeights, "fit changes the sample weights"),
    (SpoilsTheValidation, "fit changes the validation rows"),
    (DrawsWithValidation, "fitting twice with validation differs"),
    (ReversesWithValidation, r"predict has shape \(5, 80\), not \(80, 5\) .* after a fit with validation"),
    (OtherDefaultLevels, r"levels=None is not k / \(m \+ 1\)"),
)
def test_what_is_given_must_be_used_rightly(fault, words):
    with pytest.raises(ContractError, match=words):
        check_aggregator(fault())


# ------------------------------------------------------------------ refusals


class ForgivesNaNTargets(Faulty):
    def fit(self, Z, y, X=None, **given):
        return super().fit(Z, np.nan_to_num(y), X, **given)


class ForgivesWeights(Faulty):
    def mend(self, weight):
        raise NotImplementedError

    def fit(self, Z, y, X=None, *, sample_weight=None, **given):
        weight = None if sample_weight is None else self.mend(sample_weight)
        return super().fit(Z, y, X, sample_weight=weight, **given)


class ForgivesNaNWeights(ForgivesWeights):
    mend = staticmethod(np.nan_to_num)


class ForgivesNegativeWeights(ForgivesWeights):
    mend = staticmethod(np.abs)


class ForgivesNoWeight(ForgivesWeights):
    def mend(self, weight):
        return weight if weight.any() else None


class ForgivesFewWeights(ForgivesWeights):
    def mend(self, weight):
        return np.resize(weight, 80) if len(weight) == 79 else weight


class PredictsNaN(Faulty):
    def fit(self, Z, y, X=None, **given):
        fitted = super().fit(Z, y, X, **given)
        return FaultyFit(fitted, predict=lambda Z, X=None: fitted.predict(np.nan_to_num(Z)))


@planted(
    (ForgivesNaNTargets, "fit accepts NaN targets"),
    (ForgivesNaNWeights, "fit accepts NaN sample weights"),
    (ForgivesNegativeWeights, "fit accepts negative sample weights"),
    (ForgivesNoWeight, "fit accepts sample weights that are all zero"),
    (ForgivesFewWeights, "fit accepts fewer sample weights than rows"),
    (PredictsNaN, "predict accepts NaN predictions"),
)
def test_what_cannot_be_used_must_be_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_aggregator(fault())


class Local(Faulty):
    needs_features = True
    real = LOCAL
    replaced = ()

    def fit(self, Z, y, X=None, **given):
        fitted = super().fit(Z, y, X, **given)
        return FaultyFit(fitted, **{name: getattr(self, name)(fitted) for name in self.replaced})


class PredictsNaNFeatures(Local):
    replaced = ("predict",)

    def predict(self, fitted):
        return lambda Z, X=None: fitted.predict(Z, None if X is None else np.nan_to_num(X))


class WeighsNaNFeatures(Local):
    replaced = ("weights",)

    def weights(self, fitted):
        return lambda X=None: fitted.weights(None if X is None else np.nan_to_num(X))


class FitsNaNFeatures(Local):
    def fit(self, Z, y, X=None, **given):
        return super().fit(Z, y, None if X is None else np.nan_to_num(X), **given)


@planted(
    (PredictsNaNFeatures, "predict accepts NaN features"),
    (WeighsNaNFeatures, "weights accepts NaN features"),
    (FitsNaNFeatures, "fit accepts NaN features"),
)
def test_features_that_cannot_be_used_must_be_refused(fault, words):
    with pytest.raises(ContractError, match=words):
        check_aggregator(fault())


# ------------------------------------------------------------------ weights that explain the prediction


class Remembers(Faulty):
    """Knows the rows of its fit by heart, and says of all others that its weights explain them."""

    def fit(self, Z, y, X=None, **given):
        fitted = super().fit(Z, y, X, **given)

        def predict(new, X=None):
            known = np.isin(new[:, 0, 0], Z[:, 0, 0])[:, None]
            return np.where(known, fitted.predict(new), new.mean(axis=1))

        return FaultyFit(fitted, predict=predict)


class LiesWhenWeighted(Faulty):
    """Says that it is linear, with an intercept that it gets from weighted rows alone."""

    def fit(self, Z, y, X=None, *, sample_weight=None, **given):
        fitted = super().fit(Z, y, X, sample_weight=sample_weight, **given)
        if sample_weight is None or np.ptp(sample_weight) == 0:
            return fitted
        return FaultyFit(fitted, predict=lambda Z, X=None: fitted.predict(Z) + 0.5)


class LiesAfterValidation(Faulty):
    def fit(self, Z, y, X=None, *, validation=None, **given):
        fitted = super().fit(Z, y, X, validation=validation, **given)
        return fitted if validation is None else FaultyFit(fitted, weights=lambda X=None: fitted.w[::-1])


class SaysThatItIsLinear(Faulty):
    """Quantile regression with an intercept, which no weights give."""

    real = QRA()

    def fit(self, Z, y, X=None, **given):
        return FaultyFit(super().fit(Z, y, X, **given), linear=True)


class LocalThatRemembers(Local):
    def fit(self, Z, y, X=None, **given):
        fitted = super().fit(Z, y, X, **given)
        rows = X

        def weights(X=None):
            w = fitted.weights(X)
            return w if len(X) == 0 or np.isin(X, rows).all() else w[:, ::-1]

        return FaultyFit(fitted, weights=weights)


@planted(
    (Remembers, r"predict is not the sum of weights\(\) times Z on new rows"),
    (LiesWhenWeighted, r"predict is not the sum of weights\(\) times Z after a fit with sample_weight"),
    (LiesAfterValidation, r"predict is not the sum of weights\(\) times Z after a fit with validation"),
    (SaysThatItIsLinear, r"predict is not the sum of weights\(\) times Z$"),
    (LocalThatRemembers, r"predict is not the sum of weights\(X\) times Z on new rows"),
)
def test_weights_must_give_the_prediction_where_they_are_said_to(fault, words):
    with pytest.raises(ContractError, match=words):
        check_aggregator(fault())


def test_without_a_claim_the_weights_need_not_give_the_prediction():
    fitted = QRA().fit(np.ones((3, 2, 1)) + np.arange(3)[:, None, None], np.arange(3.0))
    assert fitted.linear is False
    check_aggregator(QRA())
