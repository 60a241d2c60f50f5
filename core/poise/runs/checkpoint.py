"""Checkpoints of a run: whole or not there, newest k and best kept.

`step-00000100.safetensors` holds tensors under `model.`, `optimizer.` and `rng`; the JSON beside it
holds what is not a tensor, and the checksums.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import FileError
from poise.files import load_bundle, load_meta, remove_bundle, save_bundle, still_there

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NAMED = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,17})\.json")  # as `Checkpoints` writes it


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at a step."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoint folder of a run.

    Every checkpoint says which run and which step it is of; what another run or another name holds is no
    checkpoint of this one.

    Parameters
    ----------
    folder : Path
    keep : int
        How many of the newest are kept; the one with the lowest score is kept besides.
    run : str
        The run's number.
    """

    def __init__(self, folder: Path, keep: int = 2, run: str = "") -> None:
        self.folder, self.keep, self.run = folder, keep, run

    def steps(self) -> list[int]:
        """Return the steps of all files that are named like a checkpoint's index, in order."""
        found = (_NAMED.fullmatch(p.name) for p in self.folder.glob("step-*.json"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write a checkpoint, then drop those of this run that are no longer kept.

        `meta["score"]`, lower is better, decides which one is best; None never is.
        """
        still_there(self.folder.parent)
        save_bundle(self._stem(step), tensors, {**meta, "step": step, "run": self.run})
        scores = self._scores()
        best = min(scores, key=lambda s: (scores[s], s), default=step)
        kept = {*sorted(scores)[-self.keep:], *([best] if scores.get(best, math.inf) < math.inf else [])}
        for old in set(scores) - kept:
            remove_bundle(self._stem(old))

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint of this run, or None when there is none at all.

        A damaged or foreign one is named on stderr and skipped: continuing from an older one gives the same
        result, only later.

        Raises
        ------
        FileError
            When no checkpoint can be used, naming the newest.
        """
        steps, first_error = self.steps(), None
        for step in reversed(steps):
            try:
                return self._load(step)
            except FileError as error:
                first_error = first_error or error
                print(f"poise: skipping a checkpoint: {error}", file=sys.stderr)
        if first_error:
            raise FileError(f"no usable checkpoint in {self.folder}: {first_error}")
        return None

    def best(self) -> Checkpoint | None:
        """Return the checkpoint of the lowest score, or None when none has one; raises as `load_bundle`."""
        scores = self._scores()
        if not scores or min(scores.values()) == math.inf:
            return None
        return self._load(min(scores, key=lambda s: (scores[s], s)))

    def _load(self, step: int) -> Checkpoint:
        tensors, meta = load_bundle(self._stem(step))
        self._check(step, meta)
        return Checkpoint(step, tensors, meta)

    def _scores(self) -> dict[int, float]:
        """Return the score of each whole checkpoint of this run."""
        scores = {}
        for step in self.steps():
            try:
                meta = load_meta(self._stem(step))
                self._check(step, meta)
            except FileError:
                continue
            score = meta.get("score")
            scores[step] = math.inf if score is None or isinstance(score, str) else float(score)
        return scores

    def _check(self, step: int, meta: Mapping[str, Any]) -> None:
        name = f"{self._stem(step)}.json"
        if meta.get("step") != step:
            raise FileError(f"{name} is of step {meta.get('step')}: give it back its name, or remove it")
        if (run := meta.get("run")) != self.run:
            raise FileError(f"{name} is of another run ({run}, this one is {self.run}): remove it")

    def _stem(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name and plain values."""
    import torch

    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"groups": state["param_groups"], "values": values}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Restore what `pack_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {
        int(i): dict(v) for i, v in plain["values"].items()
    }
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    groups = [dict(g) for g in plain["groups"]]
    for group in groups:  # JSON has no tuples; torch's betas are one
        for key, value in group.items():
            if key != "params" and isinstance(value, list):
                group[key] = tuple(value)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
