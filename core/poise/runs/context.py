"""What a recipe sees of the world: directory, seeds, device, records, checkpoints, progress."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from poise.interfaces import Tracker
from poise.runs.checkpoint import Checkpoint, Checkpoints
from poise.runs.progress import progress
from poise.runs.records import Records
from poise.runs.signals import handled


class Interrupted(Exception):
    """The run was asked to stop and has left a checkpoint."""


def seed_for(seed: int, purpose: str) -> int:
    """Return a 63-bit seed of its own for each purpose, so that a new consumer shifts no other."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RunContext:
    """The context of one run; as a library, `RunContext(directory)` is enough.

    Parameters
    ----------
    directory : Path
        Where records, checkpoints and artefacts go.
    seed : int
        The run's one seed; use `seed_for(purpose)`.
    device : str
        A torch device.
    run : str
        The run's number, which its checkpoints carry.
    keep : int
        Newest checkpoints kept.
    tracker : Tracker, optional
        Mirror of the metrics.
    quiet : bool
        No progress output.
    """

    def __init__(
        self, directory: Path | str, seed: int = 0, device: str = "cpu", *, run: str = "",
        keep: int = 2, tracker: Tracker | None = None, quiet: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.seed, self.device, self.run, self.quiet = seed, device, run, quiet
        self.records = Records(self.directory)
        self.checkpoints = Checkpoints(self.directory / "checkpoints", keep, run)
        self.resume_from: Checkpoint | None = None
        self.earlier: dict[str, Any] = {}  # the status that a resume found
        self.going = self.stopping = False
        self._tracker = tracker

    def seed_for(self, purpose: str) -> int:
        """Return a 63-bit seed derived from (seed, purpose)."""
        return seed_for(self.seed, purpose)

    @contextlib.contextmanager
    def seeded(self, purpose: str) -> Iterator[None]:
        """Run a block on torch's global generator seeded for a purpose, then restore it."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed_for(purpose))
            yield

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics at a step."""
        self.going = True
        self.records.log(step, values)
        if self._tracker is not None:
            self._tracker.log(step, values)

    def note(self, key: str, value: Any) -> None:
        """Keep a plain JSON value in the summary."""
        self.records.notes[key] = value

    def progress(self, total: int | None, label: str) -> Any:
        """Return a context manager with `advance(n=1, note="")`."""
        return progress(total, label, self.quiet)

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Within the block, the first request to stop only sets `stopping`; a second one raises."""

        def ask(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        self.going = True
        with handled(ask):
            yield
