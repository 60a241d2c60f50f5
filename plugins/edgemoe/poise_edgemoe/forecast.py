"""How often experts will be in memory under a limit, said before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from poise.errors import ConfigError
from poise_edgemoe.budget import Budget, share_kept
from poise_edgemoe.cache.hits import hits_of, likely_hits, slots_at
from poise_edgemoe.cache.traces import read_trace
from poise_edgemoe.store.index import read_index


def forecast(path: Path | str, budget: Budget, trace: Path | str | None = None) -> str:
    """Return in one line the share of hits to expect under the default policy.

    Parameters
    ----------
    trace : path, optional
        Recorded routing, which is simulated at the share of experts that the budget keeps; without, a
        range: from random routing to the best of three recorded models.

    Raises
    ------
    ConfigError
        For a trace where all experts stay in memory.
    """
    kept = share_kept(read_index(path), budget)
    if kept == 1:
        if trace is not None:
            raise ConfigError(f"--trace {trace} has no effect, as all experts stay in memory: leave it "
                              f"out, or give a lower limit")
        return "hits to expect: all, but for the first use of each expert"
    if trace is not None:
        recorded = read_trace(trace)
        slots = slots_at(recorded, kept)
        return (f"hits to expect: {hits_of(recorded, slots):.0%} (simulated: {slots} of the "
                f"{recorded.layers * recorded.experts} experts in {trace})")
    least, most = likely_hits(kept)
    return (f"hits to expect: {least:.0%} if routing is random, up to {most:.0%} if it is as in the best "
            f"of three recorded models; for this one: poise moe bench {path} --simulate")
