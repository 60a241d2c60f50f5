"""Trackers mirror the records, value for value; without their package, the extra is named."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import some
from cli_helpers import TINY, Finished, observed, python

import poise
from poise.runs.records import load_run

Rows = set[tuple[int, str, float]]


def tracked(here: Path, name: str) -> Path:
    """Run with a tracker and return the run's directory."""
    poise.run([*TINY, f"tracker={name}", "hydra.run.dir=run"])
    return here / "run"


def agree(mirrored: Rows, recorded: Rows, relative: float = 0.0) -> None:
    """Check that two sets of (step, name, value) are the same, values to a precision."""
    assert {r[:2] for r in mirrored} == {r[:2] for r in recorded}
    values = {r[:2]: r[2] for r in recorded}
    for step, name, value in mirrored:
        assert math.isclose(value, values[step, name], rel_tol=relative, abs_tol=0.0), name


# ------------------------------------------------------------------ TensorBoard


def tf_records(path: Path) -> Iterator[bytes]:
    """Yield the records of an event file: length, its checksum, data, its checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def test_tensorboard_holds_what_was_recorded(here):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    directory = tracked(here, "tensorboard")
    (path,) = (directory / "tensorboard").glob("events.*")
    events = [event_pb2.Event.FromString(r) for r in tf_records(path)]
    found = {
        (e.step, v.tag, v.simple_value)
        for e in events for v in e.summary.value if v.WhichOneof("value") == "simple_value"
    }
    single = 2.0**-23  # event files hold single precision
    agree({r for r in found if not r[1].startswith("final/")}, set(observed(directory)), single)
    final = {(0, f"final/{k}", v) for k, v in load_run(directory).metrics.items()}
    agree({r for r in found if r[1].startswith("final/")}, final, single)


# ------------------------------------------------------------------ MLflow


@pytest.mark.slow  # its first migration alone takes longer than all other trackers
def test_mlflow_holds_what_was_recorded(here):
    mlflow = pytest.importorskip("mlflow")
    directory = tracked(here, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{directory}/mlflow.db")
    experiment = client.get_experiment_by_name("poise")
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.info.status == "FINISHED" and one.data.params["model.hidden"] == "[8]"
    names = {name for _, name, _ in observed(directory)}
    found = {
        (m.step, name, m.value)
        for name in names for m in client.get_metric_history(one.info.run_id, name)
    }
    agree(found, set(observed(directory)))
    for name, value in load_run(directory).metrics.items():
        assert one.data.metrics[f"final/{name}"] == value


# ------------------------------------------------------------------ Weights & Biases


WRITTEN = 60  # seconds


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file: a 7-byte head, then LevelDB's log format."""
    data, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record head fits into the rest of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):  # still being written
            return
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            yield b"".join(parts)
            parts = []


def test_wandb_holds_what_was_recorded_and_stays_offline(here):
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    directory = tracked(here, "wandb")
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    deadline, records = time.monotonic() + WRITTEN, []
    while not any(r.HasField("exit") for r in records) and time.monotonic() < deadline:
        time.sleep(0.1)  # a process of its own writes the file, and may still be at it on a busy machine
        records = [messages.Record.FromString(r) for r in wandb_records(path)]
    found = set()
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            step = items.get("_step", record.history.step.num)
            found |= {(step, k, v) for k, v in items.items() if not k.startswith("_")}
    agree(found, set(observed(directory)))
    kinds = [r.WhichOneof("record_type") for r in records]
    assert "summary" in kinds and [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


# ------------------------------------------------------------------ without the package

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from poise.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def without(module: str, here: Path, *argv: str) -> Finished:
    return python(BLOCKED, module, *argv, cwd=here)


@pytest.mark.parametrize(
    "module, extra",
    some([("tensorboardX", "tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")],
         keep=[("tensorboardX", "tensorboard")]),
)
def test_a_tracker_without_its_package_names_the_extra(here, module, extra):
    refused = without(module, here, "run", *TINY, f"tracker={extra}", "hydra.run.dir=run")
    refused.refuses(2, module, f"pip install 'poise[{extra}]'")
    assert not (here / "run").exists() or load_run(here / "run").state == "failed"


@pytest.mark.parametrize(
    "module, argv",
    [
        ("matplotlib", ["report", "RUN", "--format", "html"]),
        ("sklearn", ["run", *TINY]),
        ("hydra_plugins", ["run", "-m", *TINY, "launcher=joblib", "seed=0,1"]),
        pytest.param(
            "transformers", ["run", "recipe=finetune", "model=smollm2", "data=gsm_symbolic"],
            marks=pytest.mark.slow),
    ],
    ids=["matplotlib", "sklearn", "joblib launcher", "transformers"],
)
def test_whatever_else_is_missing_the_extra_is_named(here, finished, module, argv):
    words = [str(finished) if a == "RUN" else a for a in argv]
    refused = without(module, here, *words)
    assert refused.code == 2 and "Traceback" not in refused.err, refused.err
    assert "pip install 'poise[" in refused.complaint


def test_listing_needs_no_extra(here):
    for module in ("transformers", "sklearn", "matplotlib", "tensorboardX"):
        assert "resnet20" in without(module, here, "list").is_done().out
