"""Conformal calibration of quantile predictions: split CQR, one-sided, CV+, nested CV+ (NumPy only).

Coverage statements are about exchangeable rows and hold on average over calibration sets and new rows,
not for a given x. `n` calibration rows, `m` levels, `K` folds; values have the unit of y. An end whose
rank lies outside 1..n is infinite, never clamped: a finite one would not have the coverage. Source:
arXiv 2103.00083, section 5; the pairs alpha = 2 tau are calibrated one by one.

After calibration the min-max sweep makes the intervals nested. It moves lower ends down and upper ends
up only, so every coverage statement "at least" survives it; sorting has no such property.
"""

from __future__ import annotations

from poise_quantagg.conformal.bounds import beta_band, cv_plus_bound, split_bounds
from poise_quantagg.conformal.cv_plus import CVPlus, NestedCVPlus
from poise_quantagg.conformal.nested import check_folds, nested_fold_arrays, nested_pairs
from poise_quantagg.conformal.parts import lower_rank, upper_rank
from poise_quantagg.conformal.split import OneSided, SplitCQR

__all__ = [
    "CVPlus", "NestedCVPlus", "OneSided", "SplitCQR", "beta_band", "check_folds", "cv_plus_bound",
    "lower_rank", "nested_fold_arrays", "nested_pairs", "split_bounds", "upper_rank",
]
