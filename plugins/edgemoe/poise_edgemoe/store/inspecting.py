"""What is in a store, as a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from poise_edgemoe.store.index import EXPERTS, padded, read_index


def table(folder: Path) -> str:
    """Return family, layers, widths and where the bytes are."""
    index = read_index(folder)
    experts = [len(layer.experts) for layer in index.layers]
    widths: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for _, _, parts in index.blobs():
        for part, m in parts.items():
            form = index.quantizers[m.form]
            name = f"{part}, {form['bits']} bits, {form['entry']}" + (
                f", group {form['group']}" if form.get("group", 0) > 0 else "")
            widths[name] += 1
            sizes[name] += padded(m.nbytes)
    lines = [f"{folder}: {index.family}, {len(index.layers)} layers of {min(experts)} to {max(experts)} "
             f"experts, computed in {index.dtype}", ""]
    lines += [f"  {name:<36} {n:>7} matrices {sizes[name] / 1e6:>10.2f} MB" for name, n in widths.items()]
    others = {n: facts["bytes"] for n, facts in index.files.items() if n != EXPERTS}
    lines += [f"  {name:<36} {'':>16} {size / 1e6:>10.2f} MB" for name, size in others.items()]
    total = sum(facts["bytes"] for facts in index.files.values())
    return "\n".join([*lines, f"  {'in all':<36} {'':>16} {total / 1e6:>10.2f} MB"])
