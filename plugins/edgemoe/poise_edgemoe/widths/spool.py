"""What experts are given: inputs of each layer, kept on disk while calibration windows pass through once.

A file for each batch of windows and each layer: which token went to which expert with which weight, and the
inputs of those tokens that an expert still needs. Files are whole or not there, so that a pass that was
killed goes on with the batch that it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.files import write_bytes
from poise_edgemoe.experts import StoredExperts
from poise_edgemoe.widths.measuring import Bench
from poise_edgemoe.widths.metrics import halves


@dataclass(frozen=True)
class Inputs:
    """What the experts of a layer were given.

    Parameters
    ----------
    hidden : Tensor, (kept, width)
        Inputs of tokens that were kept.
    row : Tensor, (uses,)
        Where a use's token lies in `hidden`; -1: it was not kept.
    expert : Tensor, (uses,)
        In the order of the tokens.
    gate : Tensor, (uses,)
    """

    hidden: Tensor
    row: Tensor
    expert: Tensor
    gate: Tensor

    def of(self, e: int, most: int) -> tuple[Tensor, Tensor, int]:
        """Return inputs and gate weights of an expert's first tokens, and how many it had in all."""
        uses = torch.where(self.expert == e)[0]
        first = uses[:most]
        return self.hidden[self.row[first]], self.gate[first], len(uses)


class Spool:
    """The files of one pass.

    Parameters
    ----------
    folder : Path
    bench : Bench
        As trained.
    windows : Tensor, (windows, length + 1)
    most : int
        Tokens of an expert that are kept, its first ones.
    """

    def __init__(self, folder: Path, bench: Bench, windows: Tensor, most: int) -> None:
        self.folder, self.bench, self.most = folder, bench, most
        self.batches = list(windows.split(bench.rows))
        self._seen = [torch.zeros(len(layer.experts), dtype=torch.long) for layer in bench.index.layers]

    def fill(self, tell: Callable[[int, int], None]) -> None:
        """Let all windows pass through the model, but for those that have."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tell(0, len(self.batches))
        for n, batch in enumerate(self.batches):
            if self._whole(n):
                for layer in range(len(self._seen)):
                    self._count(layer, self._load(n, layer)["expert"])
            else:
                with self._listening(n):
                    halves(self.bench.engine, batch)
            tell(n + 1, len(self.batches))

    def layer(self, layer: int) -> Inputs:
        """Return what a layer's experts were given, of all batches."""
        hidden, row, expert, gate, at = [], [], [], [], 0
        for n in range(len(self.batches)):
            found = self._load(n, layer)
            where = torch.full((int(found["rows"]),), -1, dtype=torch.long)
            where[found["kept"]] = at + torch.arange(len(found["kept"]))
            at += len(found["kept"])
            hidden.append(found["hidden"])
            row.append(where[found["token"]])
            expert.append(found["expert"])
            gate.append(found["gate"])
        return Inputs(*(torch.cat(some) for some in (hidden, row, expert, gate)))

    def uses(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return (token, expert) of every use, tokens counted over all batches."""
        token, expert, at = [], [], 0
        for n in range(len(self.batches)):
            found = self._load(n, layer)
            token.append(found["token"] + at)
            expert.append(found["expert"])
            at += int(found["rows"])
        return torch.cat(token), torch.cat(expert)

    def tokens(self, layer: int) -> int:
        """Return how many tokens passed through a layer."""
        return sum(int(self._load(n, layer)["rows"]) for n in range(len(self.batches)))

    def _path(self, n: int, layer: int) -> Path:
        return self.folder / f"{n:06d}-{layer:04d}.safetensors"

    def _whole(self, n: int) -> bool:
        return all(self._path(n, layer).is_file() for layer in range(len(self._seen)))

    def _load(self, n: int, layer: int) -> dict[str, Tensor]:
        from safetensors.torch import load

        return load(self._path(n, layer).read_bytes())

    def _count(self, layer: int, expert: Tensor) -> None:
        self._seen[layer] += torch.bincount(expert, minlength=len(self._seen[layer]))

    @contextmanager
    def _listening(self, n: int) -> Iterator[None]:
        def listen(module: Any, given: tuple[Any, ...]) -> None:
            self._write(n, module, *given)

        hooks = [m.register_forward_pre_hook(listen) for m in self.bench.engine.experts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _write(self, n: int, module: StoredExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        from safetensors.torch import save

        routed = module._routed(index)
        token = torch.cat([t for _, t, _ in routed])
        expert = torch.cat([torch.full_like(t, e) for e, t, _ in routed])
        gate = torch.cat([weights[t, slot].float() for _, t, slot in routed])
        order = torch.argsort(token * (int(expert.max()) + 1) + expert)
        token, expert, gate = token[order], expert[order], gate[order]
        seen = self._seen[module.number]
        kept = torch.unique(token[_ranks(expert, seen) < self.most])
        self._count(module.number, expert)
        made = {"token": token, "expert": expert, "gate": gate, "kept": kept,
                "hidden": hidden[kept].contiguous(), "rows": torch.tensor(len(hidden))}
        write_bytes(self._path(n, module.number), save(made))


def _ranks(expert: Tensor, seen: Tensor) -> Tensor:
    """Return the how-many-th use of its expert each use is, from 0, where some were seen before."""
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=len(seen))
    first = torch.cumsum(counts, 0) - counts
    ranks = torch.empty_like(expert)
    ranks[order] = torch.arange(len(expert)) - first[expert[order]]
    return ranks + seen[expert]
