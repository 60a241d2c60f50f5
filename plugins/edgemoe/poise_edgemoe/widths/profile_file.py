"""A profile: what each width costs and damages, expert by expert; its file, and what is refused of one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, FileError
from poise.files import read_json, read_regular, write_bytes, write_json
from poise_edgemoe.cache.traces import RoutingTrace, write_trace

if TYPE_CHECKING:
    from torch import Tensor

KIND, VERSION = "poise profile", 1
BY_WIDTH = ("nbytes", "weight_error", "output_error", "output_error_se", "damage")
MOST_MOMENTS = 1 << 34  # bytes


@dataclass(frozen=True)
class Entry:
    """An expert, or one matrix of it.

    Parameters
    ----------
    name : str
        `model.layers.0.mlp.experts.3`, with the part behind it where matrices are chosen one by one.
    layer, expert : int
        Layers with experts are counted, encoder before decoder.
    parts : list of str
        Its matrices.
    tokens : int
        Of the calibration that its router sent to it; 0: errors are estimated.
    reads : float
        Chance that a token uses it.
    nbytes : dict
        Width to bytes in `experts.bin`, scales and filled pages included.
    weight_error, output_error, output_error_se : dict
        Width to ||W - W^||^2; to sum of g^2 ||f(h) - f^(h)||^2 over calibration tokens; to its standard
        error.
    loss_increase, loss_increase_se : float or None
        Of the whole model with this one at the low width and the others at the high one, where measured.
    damage : dict
        Width to what it adds to the metric's badness; what allocations sum up.
    """

    name: str
    layer: int
    expert: int
    parts: list[str]
    tokens: int
    kept: int
    reads: float
    nbytes: dict[int, int]
    weight_error: dict[int, float]
    output_error: dict[int, float]
    output_error_se: dict[int, float]
    damage: dict[int, float]
    loss_increase: float | None = None
    loss_increase_se: float | None = None


@dataclass(frozen=True)
class Profile:
    """What a model's experts lose at each width.

    Parameters
    ----------
    model : dict
        `identity`, `family`, `dtype` and the `layers` with experts: path, encoder, number of experts.
    options : dict
        What it was made with: scheme, group, widths, rounding, damage, metric, seed, windows, ...
    data : dict
        `checksum` of the text or the tokens, `tokens` that passed through.
    measured : dict
        Badness of the model on both halves: as trained and with all experts at one width; by layer what the
        narrowest width adds.
    entries : list of Entry
    notes : list of str
        What a reader should know: experts without tokens, widths that a loss does not tell apart.
    """

    model: dict[str, Any]
    options: dict[str, Any]
    data: dict[str, Any]
    measured: dict[str, Any]
    entries: list[Entry]
    notes: list[str]
    trace: RoutingTrace | None = field(default=None, repr=False, compare=False)
    moments: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    model_source: Any = field(default=None, repr=False, compare=False)
    data_source: Any = field(default=None, repr=False, compare=False)
    path: Path | None = field(default=None, compare=False)

    @property
    def widths(self) -> list[int]:
        """Widths that were looked at, ascending."""
        return self.options["widths"]

    def save(self, path: Path | str) -> Path:
        """Write it, the trace and the inputs' mean squares beside it; the profile last."""
        path = Path(path)
        said = {"kind": KIND, "version": VERSION, "model": self.model, "options": self.options,
                "data": self.data, "source": self._source(path), "files": {}, "measured": self.measured,
                "notes": self.notes, "entries": [_written(one) for one in self.entries]}
        if self.trace is not None:
            said["files"]["trace"] = beside(path, ".route.csv.gz").name
            write_trace(beside(path, ".route.csv.gz"), self.trace)
        if self.moments:
            from safetensors.torch import save

            said["files"]["moments"] = beside(path, ".moments.safetensors").name
            tensors = {k: self.moments[k].contiguous() for k in sorted(self.moments)}
            write_bytes(beside(path, ".moments.safetensors"), save(tensors))
        write_json(path, said)
        return path

    def _source(self, path: Path) -> dict[str, str | None]:
        """Return where model and data lie, seen from the profile: a folder that holds all may be moved."""
        kept = {"model": self.model_source, "data": self.data_source}
        home = path.absolute().parent
        return {k: os.path.relpath(Path(v).absolute(), home) if isinstance(v, (str, Path)) else None
                for k, v in kept.items()}


def beside(path: Path, ending: str) -> Path:
    """Return the path of a file that belongs to another: `profile.json` has `profile.route.csv.gz`."""
    return path.with_name(path.name.removesuffix(".json") + ending)


def _written(entry: Entry) -> dict[str, Any]:
    return {k: {str(b): x for b, x in v.items()} if k in BY_WIDTH else v for k, v in asdict(entry).items()
            if v is not None}


def load_profile(path: Path | str) -> Profile:
    """Read a profile.

    Raises
    ------
    FileError
        For a file that is none, torn, of another version, or holds numbers that no profile has.
    """
    path = Path(path)
    said = read_json(path)
    if not isinstance(said, dict) or said.get("kind") != KIND:
        raise FileError(f"{path} is no profile: make one with poise moe profile MODEL --data FILE --out "
                        f"{path}")
    if said.get("version") != VERSION:
        raise FileError(f"{path} has version {said.get('version')!r}; this Poise reads {VERSION}: make it "
                        f"again")
    try:
        entries = [_read(one, said["options"]["widths"]) for one in said["entries"]]
        if not entries:
            raise ValueError("it has no entries")
        source = {k: None if v is None else path.absolute().parent / v for k, v in said["source"].items()}
        return Profile(said["model"], said["options"], said["data"], said["measured"], entries,
                       said["notes"], moments=read_moments(path, said["files"].get("moments")),
                       model_source=source["model"], data_source=source["data"], path=path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{path} is no whole profile: {what}; make it again") from None


def _read(said: dict[str, Any], widths: list[int]) -> Entry:
    made: dict[str, Any] = {k: {int(b): x for b, x in v.items()} if k in BY_WIDTH else v
                            for k, v in said.items()}
    for name in BY_WIDTH:
        if sorted(made[name]) != widths:
            raise ValueError(f"{name} of {said['name']} is not of the widths {widths}")
        bad = [x for x in made[name].values()
               if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) or x < 0]
        if bad:
            raise ValueError(f"{name} of {said['name']} is {bad[0]!r:.40}")
    return Entry(**made)


def read_moments(path: Path, name: str | None) -> dict[str, Tensor]:
    if name is None:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load

    if Path(name).name != name:
        raise ValueError(f"it names {name!r}: only files beside it are read")
    try:
        return load(read_regular(path.with_name(name), MOST_MOMENTS))
    except SafetensorError as error:
        raise FileError(f"{path.with_name(name)} is torn: {error}") from None


def check_identity(profile: Profile, identity: str, what: str) -> None:
    """Refuse a model that a profile was not made from.

    Raises
    ------
    ConfigError
    """
    if identity != profile.model["identity"]:
        raise ConfigError(f"the profile was made from another model ({profile.model['family']}, identity "
                          f"{profile.model['identity'][:12]}) than {what} ({identity[:12]}): profile this "
                          f"one")
