"""Profiling: how much each width damages each expert, in one streaming pass over a store.

Source: EdgeMoE section III-B (loss with one expert narrow around the others); the error of an expert's own
output, which takes one pass for all of them, is ours.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from poise.errors import ConfigError
from poise_edgemoe.widths.damages import fill_unvisited
from poise_edgemoe.widths.forms import WIDTHS, Forms
from poise_edgemoe.widths.gathering import (
    Work,
    entries_of,
    measure_experts,
    measure_losses,
    measure_model,
    planned,
    trace_of,
)
from poise_edgemoe.widths.journal import Journal
from poise_edgemoe.widths.measuring import Bench
from poise_edgemoe.widths.metrics import metric_of
from poise_edgemoe.widths.opening import Tell, alone, identity_of_model, store_of
from poise_edgemoe.widths.profile_file import Profile
from poise_edgemoe.widths.spool import Spool
from poise_edgemoe.widths.texts import windows_of

DAMAGES = ("weight", "output", "loss")
PERS = ("expert", "projection")


def profile(
    model: Any, data: Any, *, out: Path | str | None = None, widths: Sequence[int] = WIDTHS,
    scheme: str = "asym_group", group: int = 64, rounding: str = "nearest", damage: str = "output",
    per: str = "expert", metric: Any = "cross_entropy", higher_is_better: bool | None = None, low: int = 2,
    high: int = 4, seed: int = 0, windows: int = 64, held_out: int = 64, length: int = 128,
    tokens_per_expert: int = 256, memory: str | int | None = None, tokenizer: Any = None,
    progress: Tell | None = None,
) -> Profile:
    """Measure how much each width damages each expert.

    Parameters
    ----------
    model : path or nn.Module
        A transformers directory, a store of 16 or 32 bits, or a live transformers model.
    data : path or Tensor
        A text, or token ids (tokens,): its first half calibrates, its second half is held out.
    out : path, optional
        The file to write; its work folder, `OUT.work`, lets a profile that was killed go on.
    widths : list of int
        Of {2, 3, 4, 8, 16} and what else the scheme has.
    scheme, group
        As `convert` has them.
    rounding : "nearest" or "weighted"
        "weighted": scales at 2 and 3 bits are fitted to what each expert is given.
    damage : "weight", "output" or "loss"
        What an expert loses at a width: error of its weights; of its output for its calibration tokens,
        weighted by its gate; or increase of the model's loss with it alone at `low`, around `high` (the
        paper's, a run for each expert; other widths in proportion to the output's error).
    per : "expert" or "projection"
        Whether an expert's matrices share a width, or each has its own.
    metric : "cross_entropy", "accuracy", "rouge2", or a function of the model
        What losses are of. A function is given an open engine (`logits`, `generate`).
    higher_is_better : bool, optional
        Of a function.
    seed : int
        Draws the windows.
    windows, held_out, length : int
        Windows of each half, and their tokens.
    tokens_per_expert : int
        Most of them that an output's error is taken on, its first ones.
    memory : str or int, optional
        Most bytes that the engine holds; None: what it needs, and a quarter of the experts.
    tokenizer : Tokenizer, optional
        Of text; None: the model's.
    progress : callable, optional
        Told what is being done, how many parts are done, and all.

    Returns
    -------
    Profile

    Raises
    ------
    ConfigError
        For an option that is not allowed, a model without experts, a store that is quantized.
    DataError
        For data that are empty, too few or of another vocabulary, and measurements that are not finite.
    FileError
        For files that are torn, or a work folder that another process uses.
    """
    ask = _checked(damage=damage, per=per, widths=list(widths), scheme=scheme, group=group,
                   rounding=rounding, low=low, high=high, seed=seed, windows=windows, held_out=held_out,
                   length=length, tokens_per_expert=tokens_per_expert)
    tell = progress or _untold
    with ExitStack() as stack:
        if out is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="poise-profile-")))
        else:
            if Path(out).is_dir():
                raise ConfigError(f"out={out} is a folder: name the file to write, as profile.json")
            work = work_folder(out)
        stack.enter_context(alone(work))
        made = _profiled(model, data, work, ask, metric, higher_is_better, memory, tokenizer, tell)
        if out is not None:
            made.save(out)
            shutil.rmtree(work)
    return made


def work_folder(out: Path | str) -> Path:
    """Return the folder beside a file in which it is made."""
    return Path(out).with_name(f"{Path(out).name}.work")


def _untold(label: str, done: int, of: int) -> None:
    """Tell nobody."""


def _checked(**ask: Any) -> dict[str, Any]:
    for name, known in (("damage", DAMAGES), ("per", PERS)):
        if ask[name] not in known:
            raise ConfigError(f"{name}={ask[name]!r} is not allowed: it must be one of {', '.join(known)}")
    least = {"seed": 0, "windows": 1, "held_out": 1, "length": 4, "tokens_per_expert": 1}
    for name, low in least.items():
        if isinstance(ask[name], bool) or not isinstance(ask[name], int) or ask[name] < low:
            raise ConfigError(f"{name}={ask[name]!r} is not allowed: it must be a whole number >= {low}")
    if ask["length"] > 512:
        raise ConfigError(f"length={ask['length']} is not allowed: windows have at most 512 tokens")
    if ask["damage"] == "loss":
        for name in ("low", "high"):
            if ask[name] not in ask["widths"]:
                raise ConfigError(f"{name}={ask[name]} is none of the widths "
                                  f"{', '.join(map(str, ask['widths']))}: add it, or give another {name}")
        if ask["low"] >= ask["high"]:
            raise ConfigError(f"low={ask['low']} must be below high={ask['high']}")
    return ask


def _profiled(
    model: Any, data: Any, work: Path, ask: dict[str, Any], metric: Any, higher: bool | None, memory: Any,
    tokenizer: Any, tell: Tell,
) -> Profile:
    metric_of(metric, higher)  # refused before anything is read
    identity = identity_of_model(model, tell)
    where = [str(Path(x).absolute()) if isinstance(x, (str, Path)) else None for x in (model, data)]
    named = metric if isinstance(metric, str) else getattr(metric, "__qualname__", repr(type(metric)))
    facts = [identity, where[:1], ask, named, higher, memory, torch.__version__, _data_facts(data)]
    journal = Journal(work, hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest())
    opened = store_of(model, identity, work, tell, tokenizer)
    forms = Forms(ask["scheme"], ask["group"], tuple(ask["widths"]), ask["rounding"], opened.index.dtype)
    chosen = metric_of(metric, higher, opened.tokenizer)
    moments: dict[str, torch.Tensor] = {}
    with Bench(opened.folder, planned(forms, opened, moments), ask["length"], memory) as bench:
        found = windows_of(data, opened.tokenizer, bench.engine.source.vocab, windows=ask["windows"],
                           held_out=ask["held_out"], length=ask["length"], seed=ask["seed"])
        did = Work(opened, forms, found, chosen, ask, work, journal, bench, tell)
        spool = Spool(work / "spool", bench, found.calibration, ask["tokens_per_expert"])
        spool.fill(lambda done, of: tell("batches passed through", done, of))
        rows, kept = measure_experts(did, spool)
        moments |= kept
        unvisited = fill_unvisited(rows)
        measured = measure_model(did)
        increases = measure_losses(did, rows) if ask["damage"] == "loss" else {}
        entries = entries_of(did, spool, rows, measured, increases)
        trace = trace_of(opened, spool)
    options = {**ask, "metric": chosen.name, "higher_is_better": chosen.higher}
    notes = [f"{len(unvisited)} of {len(rows)} were given no token; their errors are estimated: "
             f"{', '.join(unvisited)}"] if unvisited else []
    facts_of = {"identity": identity, "family": opened.index.family, "dtype": opened.index.dtype,
                "layers": [{"path": one.path, "encoder": one.encoder, "experts": len(one.experts)}
                           for one in opened.index.layers]}
    about = {"checksum": found.checksum, "tokens": spool.tokens(len(opened.index.layers) - 1)}
    return Profile(facts_of, options, about, measured, entries, notes, trace, kept, model, data)


def _data_facts(data: Any) -> Any:
    """Return what tells data from others, before they are read as tokens."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return hashlib.sha256(data.numpy().tobytes()).hexdigest() if isinstance(data, torch.Tensor) else None
