"""Checkpoints of a run: whole or not there, newest k and best kept.

`step-00000100.safetensors` holds tensors under `model.`, `optimizer.` and `rng`; the JSON beside it
holds what is not a tensor, and the checksums.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import FileError
from poise.files import load_bundle, load_meta, remove_bundle, save_bundle

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at a step."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoint folder of a run.

    Parameters
    ----------
    folder : Path
    keep : int
        How many of the newest are kept; the one with the lowest score is kept besides.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that have an index, in order."""
        return sorted(int(p.stem.split("-")[1]) for p in self.folder.glob("step-*.json"))

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write a checkpoint, then drop those no longer kept.

        `meta["score"]`, lower is better, decides which one is best; None never is.
        """
        save_bundle(self._stem(step), tensors, {**meta, "step": step})
        scores = {s: self._score(s) for s in self.steps()}
        best = min(scores, key=lambda s: (scores[s], s))
        kept = {*sorted(scores)[-self.keep:], *([best] if scores[best] < math.inf else [])}
        for old in set(scores) - kept:
            remove_bundle(self._stem(old))

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None when there is none at all.

        A damaged one is named on stderr and skipped: continuing from an older one gives the same
        result, only later.

        Raises
        ------
        FileError
            When every checkpoint is damaged, naming the newest.
        """
        steps, first_error = self.steps(), None
        for step in reversed(steps):
            try:
                tensors, meta = load_bundle(self._stem(step))
                return Checkpoint(step, tensors, meta)
            except FileError as error:
                first_error = first_error or error
                print(f"poise: skipping a damaged checkpoint: {error}", file=sys.stderr)
        if first_error:
            raise FileError(f"no usable checkpoint in {self.folder}: {first_error}")
        return None

    def best(self) -> Checkpoint | None:
        """Return the checkpoint of the lowest score, or None when none has one; raises as `load_bundle`."""
        scores = {step: self._score(step) for step in self.steps()}
        if not scores or min(scores.values()) == math.inf:
            return None
        step = min(scores, key=lambda s: (scores[s], s))
        tensors, meta = load_bundle(self._stem(step))
        return Checkpoint(step, tensors, meta)

    def _score(self, step: int) -> float:
        try:
            score = load_meta(self._stem(step)).get("score")
        except FileError:
            return math.inf
        return math.inf if score is None or isinstance(score, str) else float(score)

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
