"""AutoGluon's tabular predictor in quantile mode, at 99 levels, one core.

Run with the environment that autogluon_env.sh made:
PYTHON benchmarks/quantile_ensembles/autogluon_peer.py WORKDIR [--preset medium_quality] [--limit 60]
    [--exclude GBM] [--clock cpu]

It fits on training and validation rows together and makes its own holdout or folds, calibrates if its
defaults say so (at least 1,000 holdout rows), and predicts with the model it thinks best. The time
limit is AutoGluon's own and concerns the fit. Every run is a process of its own; its record counts
fit and prediction, imports left out. What exists already is skipped, also a recorded failure.

--exclude GBM leaves out LightGBM, which is fitted first, once per level with up to 10,000 rounds: at 99
levels on one core it takes a limit of 60 s for itself, and on larger sets nothing at all is fitted then.

--clock cpu counts the limit in CPU seconds of the process: AutoGluon asks time.time() how much of its
limit is left, and here that advances with the CPU. On an idle machine it makes no difference; on a busy
one a limit in wall seconds would charge AutoGluon for its neighbours' work.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from splits import MAIN, SEEDS, TABLES
from store import LEVELS, Case, Meter, cases, done, load_case, prediction_path, run_alone, save, versions

PRESETS = ("medium_quality", "good_quality", "high_quality", "best_quality")
PACKAGES = ("autogluon.tabular", "lightgbm", "catboost", "torch", "fastai", "scikit-learn", "numpy",
            "pandas")


class Warned(logging.Handler):
    """Keep what AutoGluon logs as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip()[:300])


def count_cpu_seconds() -> None:
    """Let time.time() advance with this process's CPU seconds from now on."""
    start = time.time() - time.process_time()
    time.time = lambda: start + time.process_time()


def frame(x: np.ndarray, y: np.ndarray | None = None) -> Any:
    import pandas as pd

    table = pd.DataFrame(x, columns=[f"x{j}" for j in range(x.shape[1])])
    return table if y is None else table.assign(target=y)


@dataclass(frozen=True)
class Setting:
    """What AutoGluon is asked for."""

    preset: str
    limit: float
    exclude: tuple[str, ...]
    clock: str

    @property
    def peer(self) -> str:
        without = "".join(f"_no_{model.lower()}" for model in self.exclude)
        unit = "cpu" if self.clock == "cpu" else ""
        return f"autogluon_{self.preset}{without}_{unit}{self.limit:.0f}"


def fitted(case: Case, folder: str, setting: Setting) -> Any:
    """Return a predictor fitted on training and validation rows."""
    from autogluon.tabular import TabularPredictor

    predictor = TabularPredictor("target", problem_type="quantile", quantile_levels=list(LEVELS),
                                 path=folder, verbosity=1)
    bagged = setting.preset != "medium_quality"
    more = {"ag_args_ensemble": {"fold_fitting_strategy": "sequential_local"}} if bagged else {}
    return predictor.fit(frame(*case.joined()), presets=setting.preset, time_limit=setting.limit,
                         excluded_model_types=list(setting.exclude), num_cpus=1, num_gpus=0, **more)


def rounded(value: float, places: int) -> float | None:
    return round(float(value), places) if np.isfinite(value) else None


def described(predictor: Any) -> dict[str, Any]:
    """Return which models were fitted, which failed, and the weights of the ensemble, if it won."""
    board = predictor.leaderboard(silent=True)
    models = [{"model": row.model, "score_val": rounded(row.score_val, 5),
               "fit_seconds": rounded(row.fit_time_marginal, 2)} for row in board.itertuples()]
    failures = predictor.model_failures()
    failed = {row.model: f"{row.exc_type}: {row.exc_str}"[:200] for row in failures.itertuples()}
    best = predictor.model_best
    info = predictor.info()["model_info"].get(best, {})
    members = next(iter(info.get("children_info", {}).values()), info)
    weights = {k: round(float(v), 4) for k, v in members.get("model_weights", {}).items()}
    return {"best": best, "weights": weights, "models": models, "failed": failed}


def run_one(workdir: Path, path: Path, setting: Setting, target: Path) -> None:
    """Fit on one split and write what it predicts and what it used."""
    import autogluon.tabular  # noqa: F401  (imports are not counted)

    case, warned = load_case(path), Warned()
    record: dict[str, Any] = {"name": case.name, "seed": case.seed, "peer": setting.peer}
    logging.getLogger("autogluon").addHandler(warned)
    if setting.clock == "cpu":
        count_cpu_seconds()
    meter, raw = Meter(), None
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        try:
            predictor = fitted(case, f"{folder}/model", setting)
            raw = predictor.predict(frame(case["x_test"])).to_numpy(float)
            record |= meter.record() | described(predictor)
        except Exception:
            record |= meter.record() | {"error": traceback.format_exc()[-2000:]}
    record |= {"warnings": list(dict.fromkeys(warned.lines)), "versions": versions(*PACKAGES)}
    save(target, raw, record)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--names", nargs="+", default=list(MAIN), choices=list(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--preset", default="medium_quality", choices=PRESETS)
    parser.add_argument("--limit", type=float, default=60, help="seconds for AutoGluon's fit")
    parser.add_argument("--exclude", nargs="*", default=[], help="AutoGluon's short names of models")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--one", help="internal: run this split, in this process")
    args = parser.parse_args()
    setting = Setting(args.preset, args.limit, tuple(args.exclude), args.clock)
    for path in [Path(args.one)] if args.one else cases(args.workdir, args.names, args.seeds):
        name, seed = path.stem.rsplit("-", 1)
        target = prediction_path(args.workdir, name, int(seed), setting.peer)
        if args.one:
            run_one(args.workdir, path, setting, target)
        elif not done(target):
            call = [__file__, str(args.workdir), "--one", str(path), "--preset", args.preset,
                    "--limit", str(args.limit), "--clock", args.clock, "--exclude", *args.exclude]
            error = run_alone(call, 600 + 5 * args.limit)
            if error and not done(target):
                save(target, None, {"name": name, "seed": int(seed), "peer": setting.peer, "error": error})
            print(path.stem, setting.peer, error or "ok", flush=True)


if __name__ == "__main__":
    main()
