"""What is in a store, as a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from poise_edgemoe.store.index import EXPERTS, padded, read_index
from poise_edgemoe.store.schemes import read_quantizer


def table(folder: Path) -> str:
    """Return family, layers, widths and where the bytes are."""
    index = read_index(folder)
    least, most = (f(len(layer.experts) for layer in index.layers) for f in (min, max))
    forms = [_form(said, str(folder)) for said in index.quantizers]
    widths: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for _, _, parts in index.blobs():
        for part, m in parts.items():
            name = f"{part}, {forms[m.form]}"
            widths[name] += 1
            sizes[name] += padded(m.nbytes)
    experts = f"{most} experts" if least == most else f"{least} to {most} experts"
    lines = [f"{folder}: {index.family}, {len(index.layers)} layers of {experts}, computed in "
             f"{index.dtype}", ""]
    lines += [f"  {name:<36} {n:>7} matrices {sizes[name] / 1e6:>10.2f} MB" for name, n in widths.items()]
    others = {n: facts["bytes"] for n, facts in index.files.items() if n != EXPERTS}
    lines += [f"  {name:<36} {'':>16} {size / 1e6:>10.2f} MB" for name, size in others.items()]
    total = sum(facts["bytes"] for facts in index.files.values())
    return "\n".join([*lines, f"  {'in all':<36} {'':>16} {total / 1e6:>10.2f} MB"])


def _form(said: dict[str, Any], where: str) -> str:
    """Return how a matrix is stored in words: not every index writes every option."""
    quantizer = read_quantizer(said, where)
    bits, group = getattr(quantizer, "bits", None), getattr(quantizer, "group", 0)
    return ", ".join([*([] if bits is None else [f"{bits} bits"]), said["entry"],
                      *([f"group {group}"] if group > 0 else []),
                      *([said["layout"]] if "layout" in said else []),
                      *([f"{said['planes']} planes"] if "planes" in said else [])])
