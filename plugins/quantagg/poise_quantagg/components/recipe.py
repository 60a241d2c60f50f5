"""The recipe `quantile`: options with defaults and ranges, heavy imports inside methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poise.options import option
from poise_quantagg.components.checked import LEVELS, LEVELS_HELP, Checked

if TYPE_CHECKING:
    from poise.interfaces import Parts
    from poise_quantagg.experiment import Settings


@dataclass(frozen=True)
class QuantileEnsemble(Checked):
    """The paper's comparison (section 1.9): cross-fit models, aggregate them in every way, score all.

    A model given to the run (`model=...`) joins `base`; an aggregator given to it joins
    `aggregators`; an adapter goes to the neural base models.
    """

    base: list[str] = option(
        ["linear", "quantile_forest", "extra_trees", "lightgbm", "hist_boosting"],
        "registered quantile models",
    )
    base_options: dict[str, Any] = option({}, "options by model name: {lightgbm: {num_leaves: 7}}")
    aggregators: list[str] = option(
        ["average", "median", "best", "greedy", "qra", "fqra", "global_coarse", "global_medium"],
        "registered aggregators",
    )
    aggregator_options: dict[str, Any] = option({}, "options by aggregator name: {local_fine: {n_iter: 5}}")
    levels: list[float] = option(LEVELS, LEVELS_HELP, above=0, below=1)
    splits: int = option(1, "random splits into training and test rows (the paper: 5)", low=1)
    folds: int = option(5, "parts of the cross-fitting", low=2)
    refit: str = option("all", "new rows by models fitted on all rows, or by the mean of the folds'",
                        choices=("all", "bag"))
    n_jobs: int = option(1, "processes for models x folds", low=1)
    figures: bool = option(True, "draw the figures of the first split")

    def check(self, parts: Parts) -> None:
        """Refuse names, options and parts that do not fit, before anything is loaded."""
        from poise_quantagg.experiment import check

        check(parts, self._settings())

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Run and return the test scores; see `poise_quantagg.experiment.run`."""
        from poise_quantagg.experiment import run

        return run(parts, context, self._settings())

    def _settings(self) -> Settings:
        from poise_quantagg.experiment import Settings

        return Settings(**vars(self))

    @staticmethod
    def report(runs: Any) -> tuple[list[Any], list[Any]]:
        """Return tables and figures over all runs of this recipe; see `poise_quantagg.reporting`."""
        from poise_quantagg.reporting import report

        return report(runs)
