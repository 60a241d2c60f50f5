"""What a user would pick from the usual libraries, at 99 levels, one thread.

Run: python benchmarks/quantile_ensembles/peers.py WORKDIR [--names ...] [--seeds 0 1 2] [--peers ...]

- lightgbm_cqr: one LightGBM per level (library defaults) fitted on the training rows; each of the 49
  symmetric pairs conformalised by MAPIE on the validation rows (its default, one correction per side);
  the median as fitted.
- forest_cqr: a quantile forest (100 trees, at least 5 rows a leaf, all rows of a leaf kept) fitted on
  the training rows, conformalised in the same way.
- hgb: one scikit-learn HistGradientBoostingRegressor per level (library defaults) fitted on training
  and validation rows together; nothing is left to calibrate on.

Where MAPIE finds the validation rows too few for a pair (fewer than 100 for the outermost), that pair
stays as fitted; the record counts such pairs. Every run is a process of its own; its record counts the
work from the first fit to the last prediction, imports left out. What exists already is skipped.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from splits import MAIN, SEEDS, TABLES
from store import LEVELS, Case, Meter, cases, done, load_case, prediction_path, run_alone, save, versions

Result = tuple[np.ndarray, dict[str, Any]]
TIMEOUT = 1800.0


class Column:
    """A fitted model to MAPIE: it returns one column of quantiles that were predicted before."""

    is_fitted_ = True

    def __init__(self, k: int) -> None:
        self.k = k

    def fit(self, x: np.ndarray, y: np.ndarray) -> Column:
        raise NotImplementedError("fitted beforehand")

    def predict(self, x: np.ndarray) -> np.ndarray:
        return x[:, self.k]


def conformalised(q_val: np.ndarray, y_val: np.ndarray, q_test: np.ndarray) -> Result:
    """Conformalise each symmetric pair of levels with MAPIE; where it refuses, leave the pair."""
    from mapie.regression import ConformalizedQuantileRegressor

    out, left = q_test.copy(), []
    middle = len(LEVELS) // 2
    for k in range(middle):
        mirror = len(LEVELS) - 1 - k
        models = [Column(k), Column(mirror), Column(middle)]
        model = ConformalizedQuantileRegressor(models, confidence_level=1 - 2 * LEVELS[k], prefit=True)
        try:
            model.conformalize(q_val, y_val)
            _, interval = model.predict_interval(q_test)
        except ValueError as error:  # too few rows for so high a level
            assert "too low" in str(error), error
            left.append(float(LEVELS[k]))
            continue
        out[:, [k, mirror]] = interval[:, :, 0]
    return out, {"pairs_not_conformalised": len(left)}


def lightgbm_cqr(case: Case) -> Result:
    from lightgbm import LGBMRegressor

    q_val, q_test = np.empty((len(case["y_val"]), 99)), np.empty((len(case["x_test"]), 99))
    for k, level in enumerate(LEVELS):
        model = LGBMRegressor(objective="quantile", alpha=level, n_jobs=1, verbosity=-1,
                              random_state=case.seed)
        model.fit(case["x_train"], case["y_train"])
        q_val[:, k], q_test[:, k] = model.predict(case["x_val"]), model.predict(case["x_test"])
    return conformalised(q_val, case["y_val"], q_test)


def forest_cqr(case: Case) -> Result:
    from quantile_forest import RandomForestQuantileRegressor

    model = RandomForestQuantileRegressor(n_estimators=100, min_samples_leaf=5, max_samples_leaf=None,
                                          n_jobs=1, random_state=case.seed)
    model.fit(case["x_train"], case["y_train"])
    q_val, q_test = (model.predict(case[part], quantiles=list(LEVELS)) for part in ("x_val", "x_test"))
    return conformalised(q_val, case["y_val"], q_test)


def hgb(case: Case) -> Result:
    from sklearn.ensemble import HistGradientBoostingRegressor

    x, y = case.joined()
    columns = []
    for level in LEVELS:
        model = HistGradientBoostingRegressor(loss="quantile", quantile=level, random_state=case.seed)
        columns.append(model.fit(x, y).predict(case["x_test"]))
    return np.stack(columns, axis=1), {}


PEERS: dict[str, Callable[[Case], Result]] = {
    "lightgbm_cqr": lightgbm_cqr, "forest_cqr": forest_cqr, "hgb": hgb,
}


def _import_all() -> None:
    import lightgbm  # noqa: F401
    import mapie.regression  # noqa: F401
    import quantile_forest  # noqa: F401
    import sklearn.ensemble  # noqa: F401


def run_one(workdir: Path, path: Path, peer: str) -> None:
    """Fit one peer on one split and write what it predicts and what it used."""
    case = load_case(path)
    assert np.array_equal(case["levels"], LEVELS)
    target = prediction_path(workdir, case.name, case.seed, peer)
    record: dict[str, Any] = {"name": case.name, "seed": case.seed, "peer": peer}
    _import_all()
    meter, raw = Meter(), None
    try:
        raw, extra = PEERS[peer](case)
        record |= meter.record() | extra
    except Exception:
        record |= meter.record() | {"error": traceback.format_exc()[-2000:]}
    packages = ("lightgbm", "mapie", "quantile-forest", "scikit-learn", "numpy")
    save(target, raw, record | {"versions": versions(*packages)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--names", nargs="+", default=list(MAIN), choices=list(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--one", help="internal: run the single peer on this split, in this process")
    args = parser.parse_args()
    if args.one:
        return run_one(args.workdir, Path(args.one), args.peers[0])
    for path in cases(args.workdir, args.names, args.seeds):
        name, seed = path.stem.rsplit("-", 1)
        for peer in args.peers:
            target = prediction_path(args.workdir, name, int(seed), peer)
            if done(target):
                continue
            call = [__file__, str(args.workdir), "--one", str(path), "--peers", peer]
            error = run_alone(call, TIMEOUT)
            if error:
                save(target, None, {"name": name, "seed": int(seed), "peer": peer, "error": error})
            print(path.stem, peer, error or "ok", flush=True)


if __name__ == "__main__":
    main()
