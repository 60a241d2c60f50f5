"""Where mixture-of-experts families keep their experts and routers, in memory and on disk.

Read in transformers 5.23 and checked on tiny models of each family (tests/core/test_families.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from poise.walk.weight import Expert, Weight

_BLOCK = re.compile(r"(.*?(?:\b|^)(?:layers|blocks|block|h))\.(\d+)\.")  # how lists of blocks are called
_FIRST = re.compile(r"(.*?)\.?\b(\d+)\.")  # where none is called so, the first number is that of a block
_HALVES = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_NUMBERED = {"gate_up": ("w1", "w3"), "down": ("w2",)}


@dataclass(frozen=True)
class Family:
    """One family's places; paths are relative to the block that routes.

    Parameters
    ----------
    block : str
        The routing block's name in memory; None: whatever holds the experts.
    router : tuple of str
        Paths of the router's matrix in the block.
    disk_block, disk_router : str
        The same on disk, where they differ.
    parts : mapping
        Live part to the names on disk of the matrices that are its rows, in this order; empty where the
        disk has what memory has.
    fused : mapping
        Live part to the key on disk that holds all experts in one tensor.
    transposed : bool
        Whether a fused tensor is (experts, in, out).
    flipped : tuple of str
        Layers whose weight is kept as (in, out).
    plain_router : bool
        Whether the router's matrix is that of an ordinary linear.
    """

    block: str = r"[^.]+"
    router: tuple[str, ...] = ("gate",)
    disk_block: str = ""
    disk_router: str = ""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    flipped: tuple[str, ...] = ()
    plain_router: bool = False


_HALVED = Family("mlp", parts=_HALVES)
_LLAMA4 = Family("feed_forward", ("router",), transposed=True)
FAMILIES: dict[str, Family] = {
    "mixtral": Family("mlp", disk_block="block_sparse_moe", parts=_NUMBERED),
    "olmoe": _HALVED,
    "qwen2_moe": _HALVED,
    "qwen3_moe": _HALVED,
    "deepseek_v2": _HALVED,
    "deepseek_v3": _HALVED,
    "granitemoe": Family("block_sparse_moe", ("router",), disk_router="router.layer",
                         fused={"gate_up": "input_linear.weight", "down": "output_linear.weight"}),
    "gpt_oss": Family("mlp", ("router",), transposed=True),
    "llama4_text": _LLAMA4,
    "llama4": _LLAMA4,
    "phimoe": Family("mlp", ("router",), "block_sparse_moe", "gate", _NUMBERED),
    "switch_transformers": Family("mlp", ("router.classifier",), plain_router=True),
    "gpt2": Family(flipped=("c_attn", "c_proj", "c_fc", "q_attn")),
}
TRANSPOSED = ("Llama4TextExperts",)
"""Classes of fused parameters (experts, in, out) that do not say so themselves, by `is_transposed`."""
OTHER = Family(router=("gate", "router", "router.classifier"), parts=_HALVES)
"""Whatever is not in the table: experts are what a child named `experts` holds."""


def family(model_type: str | None) -> Family:
    """Return the row of a `model_type` of transformers, or the one of all others."""
    return FAMILIES.get(model_type or "", OTHER)


def holds_experts(path: str) -> bool:
    """Tell whether a module at this path keeps experts in fused parameters: it is called `experts`."""
    return path.rpartition(".")[2] == "experts"


def part_name(parameter: str) -> str:
    """Return the name of an expert's matrix from that of its parameter: `gate_up` for `gate_up_proj`."""
    return parameter.removesuffix("_proj")


def placed(found: Iterable[Weight], families: Mapping[str, Family]) -> list[Weight]:
    """Give the weights of a model, in their order, the roles, names and numbers that their places imply.

    Parameters
    ----------
    families : mapping
        The family of each model in it, by path.
    """
    found = [_expert_of_its_own(w) for w in found]
    routers = {f"{block}.{name}".lstrip(".") for block in {w.name.rpartition(".experts.")[0] for w in found
                                                 if w.role == "expert"}
               for name in _family_at(block, families).router}
    number = _block_numbers([w.name for w in found])
    return [
        replace(w, expert=replace(w.expert, layer=number(w.name))) if w.expert is not None
        else replace(w, role="router") if w.name in routers else w
        for w in found
    ]


def _family_at(path: str, families: Mapping[str, Family]) -> Family:
    roots = (root for root in families if not root or f"{path}.".startswith(f"{root}."))
    return families.get(next(roots, "-"), OTHER)


def _expert_of_its_own(w: Weight) -> Weight:
    """Recognise an expert whose matrices are layers: `mlp.experts.expert_0.wi`, `mlp.experts.0.w1`."""
    hit = re.fullmatch(r"((?:.*\.)?experts)\.(?:expert_)?(\d+)\.(\w+)", w.name)
    if hit is None or w.role not in ("linear", "expert"):
        return w
    block, number, part = hit[1], int(hit[2]), hit[3]
    return replace(w, role="expert", name=f"{block}.{number}.{part}", expert=Expert(-1, number, part))


def _block_numbers(names: list[str]):
    """Return a function from a weight's name to the running number of its block.

    Stacks of blocks (`encoder.block`, `decoder.block`) are counted one after the other, encoders first.
    """
    pattern = _BLOCK if any(_BLOCK.match(name) for name in names) else _FIRST
    stacks: dict[str, int] = {}
    for name in names:
        if (hit := pattern.match(name)) and not hit[1].endswith("experts"):
            stacks[hit[1]] = max(stacks.get(hit[1], 0), int(hit[2]) + 1)
    first, start = {}, 0
    for stack in sorted(stacks, key=lambda s: "encoder" not in s):
        first[stack], start = start, start + stacks[stack]

    def number(name: str) -> int:
        # the first number of `experts.3.down` is an expert's: it has no block
        hit = pattern.match(name)
        return first[hit[1]] + int(hit[2]) if hit and hit[1] in first else -1

    return number
