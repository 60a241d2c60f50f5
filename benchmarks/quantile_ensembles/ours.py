"""The default `QuantileAggregatorRegressor` on the same splits as the peers, one thread.

    python ours.py WORKDIR [--names A B ...] [--seeds 0 1 2]

Fitted on training and validation rows together. Writes the quantiles, and its calibrated 80 and 90 %
intervals, beside those of the peers; skips what exists.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import store

PEER = "poise_default"


def one(path: Path, workdir: Path) -> None:
    """Fit and predict one split."""
    import numpy as np

    from poise_quantagg import QuantileAggregatorRegressor, QuantileWarning

    case, meter = store.load_case(path), store.Meter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantileWarning)
        model = QuantileAggregatorRegressor(random_state=0).fit(*case.joined())
        raw = model.predict_quantiles(case["x_test"])
        record = meter.record()
        ends = {level: model.predict_interval(case["x_test"], alpha=1 - level) for level in (0.8, 0.9)}
    y = case["y_test"]
    for level, q in ends.items():
        record[f"cv_plus_cover{round(100 * level)}"] = float(np.mean((q[:, 0] <= y) & (y <= q[:, 1])))
        record[f"cv_plus_length{round(100 * level)}"] = float(np.mean(q[:, 1] - q[:, 0]))
    z = model.cross_fit_.predict(case["x_test"])
    wis = {name: wis_paper(y, z[:, j]) for j, name in enumerate(model.model_names_)}
    first = next(row["model"] for row in model.leaderboard_ if row["model"] in wis)
    record |= {"wis_of_models": wis, "best_by_validation": first, "wis_of_best": wis[first]}
    target = store.prediction_path(workdir, case.name, case.seed, PEER)
    store.save(target, raw, {"peer": PEER, "set": case.name, "seed": case.seed, **record})
    print(f"{path.stem}: WIS {wis_paper(y, raw):.3f}, best {wis[first]:.3f}", flush=True)


def wis_paper(y, q) -> float:
    """Return 2 sum of pinball of sorted quantiles, mean over rows."""
    import numpy as np

    u = y[:, None] - np.sort(q, axis=1)
    return float(2 * np.maximum(store.LEVELS * u, (store.LEVELS - 1) * u).sum(axis=1).mean())


def main() -> None:
    """Run the chosen splits."""
    from splits import MAIN

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--names", nargs="+", default=list(MAIN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--one", type=Path, help="one split, in this process")
    options = parser.parse_args()
    if options.one:
        one(options.one, options.workdir)
        return
    for path in store.cases(options.workdir, options.names, options.seeds):
        name, seed = path.stem.rsplit("-", 1)
        if store.done(store.prediction_path(options.workdir, name, int(seed), PEER)):
            continue
        failed = store.run_alone([__file__, str(options.workdir), "--one", str(path)], 3600)
        print(f"{path.stem}: {failed or 'ok'}", flush=True)


if __name__ == "__main__":
    main()
