"""A run that is killed, again and again, ends like the one that was left alone, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cases import some
from cli_helpers import finish, result, start, wait_for

from poise.cli.main import main
from poise.runs.records import find_runs, load_run

pytestmark = pytest.mark.xdist_group("kill")  # they share a run
WORDS = (
    "threads=1", "model.hidden=[256,256]", "model.dropout=0.1", "train.optimizer=adamw",
    "train.batch_size=256", "train.schedule=cosine", "train.warmup=5", "train.steps=120",
    "train.eval_every=40", "train.log_every=3", "train.checkpoint_every=7",
)


@dataclass(frozen=True)
class Reference:
    """A run that was left alone: where it is, when it had begun, how long it took."""

    directory: Path
    began_s: float
    took_s: float


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    started = time.monotonic()
    process = start("run", *WORDS, "hydra.run.dir=run", cwd=folder)
    wait_for((folder / "run/resolved.yaml").exists, process)
    began = time.monotonic() - started
    finish(process).is_done()
    return Reference(folder / "run", began, time.monotonic() - started)


def go_on(here: Path) -> list[str]:
    """Return the words that start the run, or continue it when it has begun."""
    if (here / "run/resolved.yaml").exists():
        return ["run", "resume=run"]
    return ["run", *WORDS, "hydra.run.dir=run"]


def is_done(here: Path) -> bool:
    return (here / "run/resolved.yaml").exists() and load_run(here / "run").state == "done"


def complete(here: Path) -> None:
    """Let the run end, in this process."""
    if not is_done(here):
        assert main(go_on(here)) == 0


def kill(here: Path, after_s: float) -> None:
    """Start or continue the run, and kill it after some time unless it ended by itself."""
    process = start(*go_on(here), cwd=here)
    deadline = time.monotonic() + after_s
    wait_for(lambda: time.monotonic() >= deadline, process)
    process.kill()
    ended = finish(process)
    assert ended.code in (0, -signal.SIGKILL), ended.err


def campaign(here: Path, reference: Reference, kills: int, seed: int) -> None:
    """Kill a run this many times at moments spread over its life, let it end, and compare."""
    generator = random.Random(seed)
    early, late = 0.7 * reference.began_s, reference.took_s
    moments = [early + (late - early) * (i + generator.random()) / kills for i in range(kills)]
    generator.shuffle(moments)
    for moment in moments:
        if not is_done(here):
            kill(here, moment)
    complete(here)
    assert result(here / "run") == result(reference.directory)


@pytest.mark.parametrize("kills", some([1, 3], keep=[1]))
def test_killed_a_run_ends_with_the_same_bits(here, reference, kills):
    campaign(here, reference, kills, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_thirty_times_over_ten_runs_each_ends_with_the_same_bits(here, reference, seed):
    campaign(here, reference, kills=3, seed=seed)


@pytest.mark.parametrize("checkpoint", [pytest.param(n, marks=pytest.mark.slow) for n in (7, 63)])
def test_killed_right_after_a_checkpoint_a_run_ends_with_the_same_bits(here, reference, checkpoint):
    process = start(*go_on(here), cwd=here)
    wait_for((here / f"run/checkpoints/step-{checkpoint:08d}.json").exists, process)
    process.kill()
    finish(process)
    assert load_run(here / "run").state == "killed"
    complete(here)
    assert result(here / "run") == result(reference.directory)


def test_killed_before_it_began_a_run_starts_in_the_same_directory(here, reference):
    kill(here, 0.1 * reference.began_s)
    assert not (here / "run/resolved.yaml").exists()
    complete(here)
    assert result(here / "run") == result(reference.directory)


def ask_to_stop(here: Path, number: int, path: str, *words: str):
    """Start or continue the run, and signal it once a file is there."""
    process = start(*(words or go_on(here)), cwd=here)
    wait_for((here / path).exists, process)
    process.send_signal(number)
    return finish(process)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_asked_to_stop_a_run_leaves_a_checkpoint_and_says_how_to_continue(here, reference, number):
    stopped = ask_to_stop(here, number, "run/checkpoints/step-00000014.json")
    stopped.refuses(130, "interrupted", "poise run resume=run")
    one = load_run(here / "run")
    assert one.state == "interrupted" and "of 120" in one.status["reason"]
    newest = max(int(p.stem.split("-")[1]) for p in (here / "run/checkpoints").glob("*.json"))
    assert f"at step {newest} of 120" in one.status["reason"]
    complete(here)
    assert result(here / "run") == result(reference.directory)


@pytest.mark.slow
def test_stopped_at_once_a_run_can_be_continued(here, reference):
    ask_to_stop(here, signal.SIGINT, "run/status.json").refuses(130, "interrupted", "resume=run")
    assert load_run(here / "run").state == "interrupted"
    complete(here)
    assert result(here / "run") == result(reference.directory)


@pytest.mark.slow
def test_stopped_while_it_is_resumed_a_run_can_be_continued_again(here, reference):
    ask_to_stop(here, signal.SIGINT, "run/checkpoints/step-00000007.json").refuses(130)
    ask_to_stop(here, signal.SIGINT, "run/checkpoints/step-00000056.json").refuses(130)
    complete(here)
    assert result(here / "run") == result(reference.directory)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_stops_and_its_runs_can_be_continued(here, reference):
    words = ["run", "-m", *WORDS, "seed=0,1", "hydra.sweep.dir=sweep"]
    stopped = ask_to_stop(here, signal.SIGINT, "sweep/0/checkpoints/step-00000007.json", *words)
    stopped.refuses(130, "interrupted")
    (directory,) = find_runs([here / "sweep"])
    assert load_run(directory).state == "interrupted"
    assert main(["run", "resume=sweep/0"]) == 0
    assert result(directory) == result(reference.directory)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_stopped_at_any_moment_a_run_can_be_continued(here, reference, seed):
    begun = reference.began_s
    process = start(*go_on(here), cwd=here)
    wait_for((here / "run/resolved.yaml").exists, process)
    time.sleep(random.Random(seed).uniform(0, reference.took_s - begun))
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert ended.code in (0, 130, -signal.SIGINT, -signal.SIGTERM) and "Traceback" not in ended.err
    complete(here)
    assert result(here / "run") == result(reference.directory)
