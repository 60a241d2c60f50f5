"""Optional mirrors of the records, each behind an extra. The records themselves never need one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import require
from poise.files import plain
from poise.options import check_options, option


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested plain values under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = plain(value)
    return found


@dataclass(frozen=True)
class TensorBoard:
    """Event files in the run's `tensorboard/` folder."""

    _live: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, init=False)

    def start(self, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        """Open the event file and write the configuration as text."""
        tensorboard = require("tensorboardX", "tensorboard")
        writer = tensorboard.SummaryWriter(str(directory / "tensorboard"), write_to_disk=True)
        writer.add_text("config", "\n".join(f"{k}: {v}  " for k, v in flat(config).items()))
        self._live["writer"] = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror metrics."""
        for name, value in values.items():
            self._live["writer"].add_scalar(name, value, step)

    def finish(self, status: str, summary: Mapping[str, float]) -> None:
        """Write the final metrics and close."""
        if writer := self._live.pop("writer", None):
            for name, value in summary.items():
                writer.add_scalar(f"final/{name}", value, 0)
            writer.close()


@dataclass(frozen=True)
class MLflow:
    """A local sqlite store; MLflow's plain file store is no longer maintained."""

    store: str = option("", "path of the sqlite file; empty: mlflow.db in the run's directory")
    experiment: str = option("poise", "MLflow experiment")
    _live: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        check_options(self)

    def start(self, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        """Create the run in the store and log the configuration as parameters."""
        mlflow = require("mlflow", "mlflow")
        require("sqlalchemy", "mlflow")
        path = Path(self.store or directory / "mlflow.db").resolve()
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}")
        found = client.get_experiment_by_name(self.experiment)
        place = (directory / "mlflow").resolve().as_uri()
        number = found.experiment_id if found else client.create_experiment(self.experiment, place)
        run_id = client.create_run(number, run_name=name).info.run_id
        for key, value in flat(config).items():
            client.log_param(run_id, key, value)
        self._live.update(client=client, run_id=run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror metrics."""
        for name, value in values.items():
            self._live["client"].log_metric(self._live["run_id"], name, float(value), step=step)

    def finish(self, status: str, summary: Mapping[str, float]) -> None:
        """Log the final metrics and close the run."""
        if client := self._live.pop("client", None):
            run_id = self._live.pop("run_id")
            for name, value in summary.items():
                client.log_metric(run_id, f"final/{name}", float(value))
            state = {"done": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
            client.set_terminated(run_id, state)


@dataclass(frozen=True)
class WandB:
    """Weights & Biases, offline: `wandb sync` uploads the run's `wandb/` folder later."""

    project: str = option("poise", "Weights & Biases project")
    _live: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        check_options(self)

    def start(self, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        """Start an offline run."""
        wandb = require("wandb", "wandb")
        settings = wandb.Settings(silent=True, console="off")
        self._live["run"] = wandb.init(
            project=self.project, name=name, dir=str(directory), config=flat(config),
            mode="offline", settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror metrics."""
        self._live["run"].log(dict(values), step=step)

    def finish(self, status: str, summary: Mapping[str, float]) -> None:
        """Write the final metrics and close."""
        if run := self._live.pop("run", None):
            run.summary.update({**summary, "status": status})
            run.finish(exit_code=0 if status == "done" else 1)
