"""Entries of the quantagg plugin."""

from __future__ import annotations

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
    add("aggregator", "global_coarse", "GlobalCoarse",
        "one simplex weight per model, exact minimiser of the pinball loss")

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

    add("recipe", "quantile", "QuantileEnsemble",
        "cross-fit quantile models, aggregate them, score on the test rows",
        base=["linear", "hist_boosting"],
        base_options={"hist_boosting": {"max_iter": 5}}, folds=2, figures=False)
