"""What is measured: each line of the table, and the files that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GROUPED, EAGER = "grouped_mm", "eager"
BUDGETS = ("45 %", "56 %", "65 %", "75 %", "90 %", "none")  # more memory is never slower
BASELINES = (("IO-FREE", "raw"), ("IO-QFREE", "q8"), ("IO-EXP", "raw"), ("IO-QEXP", "q4"))


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Parameters
    ----------
    name : str
        Unique; what it is, without its limit.
    worker : str
        "llama", or one of `torch_worker.py`.
    needs : str
        The file or folder that it runs on.
    limit : str
        Key of a limit: "none", "3 GB", or a share of the GGUF file, such as "75 %".
    more : dict
        What else the worker is asked for.
    smoke : bool
        Whether it belongs to the smoke form.
    """

    name: str
    worker: str
    needs: str
    limit: str = "none"
    threads: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    smoke: bool = False

    @property
    def key(self) -> str:
        """Return what rows are kept under."""
        return f"{self.name}, {self.limit}, -t {self.threads}"


def lines() -> list[Line]:
    """Return all of them; neighbours are compared."""
    found = [Line("device", "device", "q4", smoke=True)]
    for limit in ("none", "75 %", "56 %"):
        for threads in (1, 2):
            smoke = limit == "75 %" and threads == 1
            found += [Line("ours", "engine", "q4", limit, threads, smoke=smoke),
                      Line("llama.cpp mmap", "llama", "gguf", limit, threads, {"repack": False}, smoke)]
        if limit != "none":
            for name, options in (("lru", {"policy": "lru"}), ("lookahead", {"prefetch": "lookahead"})):
                found.append(Line(f"ours, {name}", "engine", "q4", limit, 1, {"options": options}))
            found.append(Line("STI-like", "baseline", "q4", limit, 1, {"baseline": "STI"}))
    others = sorted({*BUDGETS} - {"none", "75 %", "56 %"})
    found += [Line("ours", "engine", "q4", limit) for limit in others]
    found += [Line("prompt, 50 % cached", "prefill", "q4", more={"share": 0.5})]
    found += [Line("llama.cpp repacked", "llama", "gguf", "none", t, {"repack": True}) for t in (1, 2)]
    found += [Line("llama.cpp repacked", "llama", "gguf", "75 %", 1, {"repack": True})]
    found += [Line(name, "baseline", needs, "none", 1, {"baseline": name}, name == "IO-EXP")
              for name, needs in BASELINES]
    found += [Line("IO-EXP, same budget", "baseline", "raw", "75 %", 1, {"baseline": "IO-EXP"})]
    found += [Line(f"replayed, {source}, 50 % cached", "replayed", "q4", "none", 1,
                   {"share": 0.5, "options": {} if source == "none" else {"prefetch": source}})
              for source in ("none", "lookahead", "oracle")]
    found += [Line(f"transformers bf16, {how}", "memory", "model", "none", 2, {"experts": how})
              for how in (EAGER, GROUPED)]
    found += [Line("accelerate bf16, disk", "offload", "model", "3 GB", 2, {"experts": GROUPED}, True)]
    return found
