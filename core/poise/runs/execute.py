"""Execute a run: claim the directory, call the recipe, close the records."""

from __future__ import annotations

import contextlib
import time
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from poise.config import RunConfig
from poise.errors import FileError, PoiseError, RunError
from poise.files import make_folder
from poise.interfaces import Tracker
from poise.runs.building import Built
from poise.runs.context import Interrupted, RunContext
from poise.runs.liveness import HeldError, lock
from poise.runs.origin import NAME, Origin, load_origin, look_at, same_inputs
from poise.runs.records import Run, load_run, load_status
from poise.runs.resume import refuse_resume, still_running
from poise.runs.signals import interruptible, undisturbed


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Run
    error: BaseException | None = None

    @property
    def exit_code(self) -> int:
        """0 done, 1 failed, 2 configuration error, 130 interrupted."""
        if self.error is None:
            return 0
        if isinstance(self.error, (Interrupted, KeyboardInterrupt)):
            return 130
        return getattr(self.error, "exit_code", 1)


def execute(
    built: Built, directory: Path | str, *, resume: bool = False, quiet: bool = False
) -> Outcome:
    """Carry out a built run in a directory and return how it ended.

    Only what goes wrong before the directory is claimed is raised; afterwards the error is in the
    outcome, and in `status.json`.
    """
    directory = Path(directory)
    with interruptible(), contextlib.ExitStack() as held:
        hold(directory, held, resume)
        context = _resumed(built, directory, quiet) if resume else _begun(built, directory, quiet)
        error = _carry_out(built, context)
    try:
        return Outcome(load_run(directory), error)
    except FileError:  # the directory was removed under the run, or what failed the run has its records too
        if isinstance(error, PoiseError):
            raise error from None
        raise


def _carry_out(built: Built, context: RunContext) -> BaseException | None:
    """Call the recipe and close the records; return what ended the run early, if anything did."""
    config, tracker = built.config, built.tracker
    try:
        _prepare_torch(config)
        context.records.environment(config.threads, config.device)
        context.records.status("running")
        if not (context.directory / NAME).exists():
            Origin(context.run, look_at(built.inputs())).write(context.directory)
        if tracker:
            tracker.start(context.directory, config.tag, config.plain())
        started = time.perf_counter()
        metrics = built.recipe.run(built.parts, context)
        context.note("seconds", round(time.perf_counter() - started, 2))
        context.records.summary(metrics)
        return _close(context, tracker, "done", None, metrics)
    except (Interrupted, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        return _close(context, tracker, "interrupted", error, {}, reason)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if not isinstance(error, PoiseError):
            _keep_traceback(context.directory)
        return _close(context, tracker, "failed", error, {}, reason)


def hold(directory: Path, held: contextlib.ExitStack, resume: bool = False) -> None:
    """Make the directory and take its lock, before anything of the run is written."""
    try:
        make_folder(directory)
        held.enter_context(lock(directory))
    except OSError as error:
        raise RunError(
            f"cannot make the run directory {directory}: {error.strerror}; choose another with "
            f"paths.out=DIR or hydra.run.dir=DIR"
        ) from None
    except HeldError:
        if resume:
            raise RunError(still_running(directory)) from None
        raise RunError(f"{directory} already holds a run, which is still running: choose another "
                       f"hydra.run.dir") from None


def _keep_traceback(directory: Path) -> None:
    try:
        (directory / "traceback.txt").write_text(traceback.format_exc())
    except OSError:  # the disk may be what failed the run
        traceback.print_exc()


def _begun(built: Built, directory: Path, quiet: bool) -> RunContext:
    """Claim the directory for a new run."""
    context = _context(built, directory, uuid.uuid4().hex, quiet)
    context.records.begin(built.config.plain())
    return context


def _resumed(built: Built, directory: Path, quiet: bool) -> RunContext:
    """Go back to the newest checkpoint of a run, once it is known to read what it read before."""
    if load_status(directory).get("state") == "done":  # by another resume, since it was looked at
        refuse_resume(directory, "done")
    origin = load_origin(directory)
    context = _context(built, directory, origin.run if origin else uuid.uuid4().hex, quiet)
    if origin:
        now = same_inputs(directory, origin.inputs, built.inputs())
        if now != origin.inputs:
            Origin(origin.run, now).write(directory)
    context.resume_from = context.checkpoints.newest()
    rows = context.resume_from.meta["rows"] if context.resume_from else 0
    context.records.open(keep_rows=rows)
    context.earlier = load_status(directory)
    return context


def _context(built: Built, directory: Path, run: str, quiet: bool) -> RunContext:
    config = built.config
    return RunContext(directory, config.seed, config.device, run=run, keep=config.train.keep,
                      tracker=built.tracker, quiet=quiet)


def _prepare_torch(config: RunConfig) -> None:
    import torch

    torch.set_num_threads(config.threads)


def _close(
    context: RunContext, tracker: Tracker | None, state: str, error: BaseException | None,
    metrics: Mapping[str, float], reason: str = "",
) -> BaseException | None:
    with undisturbed():
        try:
            if state == "failed" and context.earlier and not context.going:  # a resume that came to nothing
                context.records.put_back(context.earlier)
            else:
                context.records.status(state, reason)
        except PoiseError as full:  # the disk that failed the run may refuse the status as well
            error = error or full
        context.records.close()
        if tracker:
            tracker.finish(state, metrics)
    return error
