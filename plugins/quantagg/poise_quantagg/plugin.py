"""Entries of the quantagg plugin."""

from __future__ import annotations

from typing import Any

PAPER = "arXiv 2103.00083"
TASKS = ("quantile",)


def register(registry) -> None:
    """Add the plugin's entries."""
    home = "poise_quantagg.components"

    def add(kind, name, attribute, summary, paper=PAPER, **example) -> None:
        registry.add(
            kind, name, f"{home}:{attribute}", summary, tasks=TASKS, example=example, paper=paper
        )

    add("aggregator", "average", "Average", "mean over models, level by level")
    add("aggregator", "median", "Median", "median over models, level by level")
    add("aggregator", "best", "Best", "the one model of least loss")
    add("aggregator", "greedy", "Greedy", "forward selection with replacement, one weight per model",
        "Caruana et al. 2004", rounds=10)
    add("aggregator", "qra", "QRA", "quantile regression on the predictions, level by level, exact",
        "Nowotarski and Weron 2015")
    add("aggregator", "fqra", "FQRA", "quantile regression on their principal components, exact",
        "Maciejowska et al. 2016", factors=2)
    add("aggregator", "global_coarse", "GlobalCoarse", "one simplex weight per model, exact")
    add("aggregator", "global_medium", "GlobalMedium", "one simplex weight per model and level, exact")
    add("aggregator", "global_fine", "GlobalFine",
        "one simplex weight per model, input level and output level, exact")
    quick: dict[str, Any] = {"n_iter": 2, "max_steps": 60, "patience": 30}
    add("aggregator", "local_coarse", "LocalCoarse", "one weight per model, by a gate on the features",
        **quick)
    add("aggregator", "local_medium", "LocalMedium",
        "one weight per model and level, by a gate on the features", **quick)
    add("aggregator", "local_fine", "LocalFine",
        "one weight per model, input and output level, by a gate on the features (DQA)", **quick)

    few = {"levels": [0.1, 0.5, 0.9]}
    trees = {**few, "n_estimators": 5, "min_samples_leaf": 4}
    add("model", "quantile_forest", "QuantileForest", "random forest, Meinshausen weights",
        "Meinshausen 2006", **trees)
    add("model", "extra_trees", "ExtraTrees", "extremely randomised trees, Meinshausen weights",
        "Meinshausen 2006; Geurts et al. 2006", **trees)
    add("model", "lightgbm", "LightGBM", "gradient boosting, one LightGBM model per level",
        "Ke et al. 2017", **few, n_estimators=5)
    add("model", "hist_boosting", "HistBoosting",
        "gradient boosting, one scikit-learn histogram model per level", "", **few, max_iter=5)
    add("model", "linear", "Linear", "linear quantile regression per level, exact",
        "Koenker and Bassett 1978", **few)

    add("model", "xgboost", "XGBoost", "gradient boosting, XGBoost's vector of quantiles",
        "Chen and Guestrin 2016", **few, n_estimators=20)
    add("model", "catboost", "CatBoost", "gradient boosting, CatBoost's MultiQuantile",
        "Prokhorenkova et al. 2018", **few, iterations=30)
    nets = {**few, "n_iter": 1, "width": 32, "depth": 2, "lr": 0.003, "max_steps": 300}
    add("model", "gaussian_net", "GaussianNet", "network for mean and variance (CGN)", **nets)
    add("model", "simultaneous_net", "SimultaneousNet", "network with the level as an input (SQR)", **nets)
    add("model", "multi_quantile_net", "MultiQuantileNet", "network with one output per level (DQR)",
        **nets)

    add("recipe", "quantile", "QuantileEnsemble",
        "cross-fit quantile models, aggregate them, score on the test rows",
        base=["linear", "hist_boosting"],
        base_options={"hist_boosting": {"max_iter": 5}}, folds=2, figures=False)
