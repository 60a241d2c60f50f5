"""A profile as a table to choose from, and a choice as a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import ConfigError
from poise_edgemoe.widths.plan import Plan
from poise_edgemoe.widths.profile_file import Entry, Profile
from poise_edgemoe.widths.solving import Table

MILLION = 1_000_000  # reads are counted in as many tokens
UNSEEN = 0.5  # uses of an expert that was not used: it might be


@dataclass(frozen=True)
class Limits:
    """Widths below which nothing goes: anywhere, and in the first and the last layer."""

    min_bits: int | None = None
    ends: int | None = None

    def least(self, layer: int, layers: int) -> int:
        """Return the least bits in a layer."""
        own = self.ends if layer in (0, layers - 1) else None
        return max(self.min_bits or 0, own or 0)


@dataclass(frozen=True)
class Choice:
    """What can be chosen.

    Parameters
    ----------
    entries : list of Entry
        Rows of the table.
    widths : int array, (rows, columns)
        Bits of each column; a width that a limit forbids stands for the least that it allows.
    unit : int
        Costs of a byte: reads are counted in a million tokens.
    what : str
        What costs are of, in words.
    """

    table: Table
    entries: list[Entry]
    widths: np.ndarray
    unit: int
    what: str

    def bits(self, chosen: np.ndarray) -> dict[tuple[int, int, str], int]:
        """Return a choice by layer, expert and part."""
        return {(one.layer, one.expert, part): int(self.widths[x, b])
                for x, (one, b) in enumerate(zip(self.entries, chosen, strict=True)) for part in one.parts}

    def nbytes(self, chosen: np.ndarray) -> int:
        """Return the bytes of `experts.bin`."""
        return sum(one.nbytes[int(self.widths[x, b])]
                   for x, (one, b) in enumerate(zip(self.entries, chosen, strict=True)))

    def reads(self, chosen: np.ndarray) -> float:
        """Return the bytes of experts that a token uses."""
        return sum(one.reads * one.nbytes[int(self.widths[x, b])]
                   for x, (one, b) in enumerate(zip(self.entries, chosen, strict=True)))


def table_of(profile: Profile, limits: Limits, objective: str, only: Sequence[int] | None = None) -> Choice:
    """Return the table of a profile, or of some of its widths.

    Raises
    ------
    ConfigError
        Where no width is left.
    """
    columns = [b for b in profile.widths if only is None or b in only]
    layers = len(profile.model["layers"])
    found = []
    for one in profile.entries:
        least = limits.least(one.layer, layers)
        if not (fit := [b for b in columns if b >= least]):
            raise ConfigError(f"no width of {', '.join(map(str, columns))} has {least} bits or more: "
                              f"profile more widths, or lower the limit")
        found.append([b if b >= least else fit[0] for b in columns])
    widths = np.array(found)
    cost = np.array([[_cost(profile, one, b, objective) for b in row]
                     for one, row in zip(profile.entries, found, strict=True)], dtype=np.int64)
    damage = np.array([[one.damage[b] for b in row]
                       for one, row in zip(profile.entries, found, strict=True)])
    if objective == "bytes":
        return Choice(Table(cost, damage), profile.entries, widths, 1, "of experts")
    return Choice(Table(cost, damage), profile.entries, widths, MILLION, "of experts that a token reads")


def _cost(profile: Profile, one: Entry, bits: int, objective: str) -> int:
    if objective == "bytes":
        return one.nbytes[bits]
    reads = max(one.reads, UNSEEN / max(1, profile.data["tokens"]))
    return round(MILLION * reads * one.nbytes[bits])


def as_plan(profile: Profile, choice: Choice, chosen: np.ndarray, report: dict[str, Any]) -> Plan:
    """Return a choice as a plan: names of matrices to bits."""
    paths = [layer["path"] for layer in profile.model["layers"]]
    names = {f"{paths[n]}.{e}.{part}": bits for (n, e, part), bits in choice.bits(chosen).items()}
    return Plan(names, profile, report)
