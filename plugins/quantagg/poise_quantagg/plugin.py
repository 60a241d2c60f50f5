"""Entries of the quantagg plugin."""

from __future__ import annotations

from typing import Any

HOME = "poise_quantagg.components"
PAPER = "arXiv 2103.00083"
TASKS = ("quantile",)

_FEW = {"levels": [0.1, 0.5, 0.9]}
_TREES = {**_FEW, "n_estimators": 5, "min_samples_leaf": 4}
_NETS = {**_FEW, "n_iter": 1, "width": 32, "depth": 2, "lr": 0.003, "max_steps": 300}
_QUICK = {"n_iter": 2, "max_steps": 60, "patience": 30}

# name, component, summary, paper, example
Line = tuple[str, str, str, str, dict[str, Any]]
AGGREGATORS: tuple[Line, ...] = (
    ("average", "Average", "mean over models, level by level", PAPER, {}),
    ("median", "Median", "median over models, level by level", PAPER, {}),
    ("best", "Best", "the one model of least loss", PAPER, {}),
    ("greedy", "Greedy", "forward selection with replacement, one weight per model",
     "Caruana et al. 2004", {"rounds": 10}),
    ("qra", "QRA", "quantile regression on the predictions, level by level, exact",
     "Nowotarski and Weron 2015", {}),
    ("fqra", "FQRA", "quantile regression on their principal components, exact",
     "Maciejowska et al. 2016", {"factors": 2}),
    ("global_coarse", "GlobalCoarse", "one simplex weight per model, exact", PAPER, {}),
    ("global_medium", "GlobalMedium", "one simplex weight per model and level, exact", PAPER, {}),
    ("global_fine", "GlobalFine", "one simplex weight per model, input level and output level, exact",
     PAPER, {}),
    ("local_coarse", "LocalCoarse", "one weight per model, by a gate on the features", PAPER, _QUICK),
    ("local_medium", "LocalMedium", "one weight per model and level, by a gate on the features",
     PAPER, _QUICK),
    ("local_fine", "LocalFine",
     "one weight per model, input and output level, by a gate on the features (DQA)", PAPER, _QUICK),
)
MODELS: tuple[Line, ...] = (
    ("quantile_forest", "QuantileForest", "random forest, Meinshausen weights", "Meinshausen 2006", _TREES),
    ("extra_trees", "ExtraTrees", "extremely randomised trees, Meinshausen weights",
     "Meinshausen 2006; Geurts et al. 2006", _TREES),
    ("lightgbm", "LightGBM", "gradient boosting, one LightGBM model per level", "Ke et al. 2017",
     {**_FEW, "n_estimators": 5}),
    ("hist_boosting", "HistBoosting", "gradient boosting, one scikit-learn histogram model per level", "",
     {**_FEW, "max_iter": 5}),
    ("linear", "Linear", "linear quantile regression per level, exact", "Koenker and Bassett 1978", _FEW),
    ("xgboost", "XGBoost", "gradient boosting, XGBoost's vector of quantiles", "Chen and Guestrin 2016",
     {**_FEW, "n_estimators": 20}),
    ("catboost", "CatBoost", "gradient boosting, CatBoost's MultiQuantile", "Prokhorenkova et al. 2018",
     {**_FEW, "iterations": 30}),
    ("gaussian_net", "GaussianNet", "network for mean and variance (CGN)", PAPER, _NETS),
    ("simultaneous_net", "SimultaneousNet", "network with the level as an input (SQR)", PAPER, _NETS),
    ("multi_quantile_net", "MultiQuantileNet", "network with one output per level (DQR)", PAPER, _NETS),
)
RECIPES: tuple[Line, ...] = (
    ("quantile", "QuantileEnsemble", "cross-fit quantile models, aggregate them, score on the test rows",
     PAPER, {"base": ["linear", "hist_boosting"], "base_options": {"hist_boosting": {"max_iter": 5}},
             "folds": 2, "figures": False}),
)


def register(registry) -> None:
    """Add the plugin's entries."""
    for kind, lines in (("aggregator", AGGREGATORS), ("model", MODELS), ("recipe", RECIPES)):
        for name, component, summary, paper, example in lines:
            registry.add(kind, name, f"{HOME}:{component}", summary, tasks=TASKS, example=dict(example),
                         paper=paper)
