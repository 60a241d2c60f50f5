"""Every form with sizes that it takes, and its change by loops over blocks."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

ADDED = ("bone", "bone_out", "mini")
GUIDED = ("bat", "bat_row", "bat_left", "bone_free")
VARIANTS = (*ADDED, *GUIDED)


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def loops(W, D, variant):
    """The change of W, entry by entry, from the definitions."""
    o, i = W.shape
    r = D.shape[-1]
    out = torch.zeros_like(W)
    if variant in ADDED:
        sizes = [len(part) for part in torch.arange(o).tensor_split(len(D))]
        shard = torch.repeat_interleave(torch.arange(len(D)), torch.tensor(sizes))
        entry = {"bone": lambda p, j: D[j % len(D), p], "bone_out": lambda p, j: D[shard[p], j],
                 "mini": lambda p, j: D[j % len(D), p % D.shape[1]]}[variant]
        for p in range(o):
            for j in range(i):
                out[p, j] = entry(p, j)
        return out
    for a in range(o // r):
        for b in range(-(-i // r)):
            rows, columns = slice(a * r, a * r + r), slice(b * r, min(i, b * r + r))
            block = W[rows, columns]
            if variant == "bat_left":
                out[rows, columns] = D[a].T @ block + D[a].T[:, : block.shape[1]]
                continue
            B = {"bat": lambda a=a, b=b: D[a], "bat_row": lambda a=a, b=b: D[b],
                 "bone_free": lambda a=a, b=b: D[a % D.shape[0], b % D.shape[1]]}[variant]()
            out[rows, columns] = block @ B + B
    return out


@st.composite
def cases(draw, variants=VARIANTS):
    """(variant, outputs, inputs, shape of the block); sizes divide only where they must."""
    variant = draw(st.sampled_from(variants))
    if variant in ADDED:
        o, i = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        r = draw(st.integers(1, o if variant == "bone_out" else i))
        m = draw(st.sampled_from([d for d in range(1, o + 1) if o % d == 0]))
        return variant, o, i, {"bone": (r, o), "bone_out": (r, i), "mini": (r, m)}[variant]
    r, a, b = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    i = draw(st.integers(1, 12)) if variant == "bat_left" else b * r
    if variant == "bat_left":
        i = max(i, r)
    tiles = draw(st.integers(1, a)), draw(st.integers(1, b))
    shape = {"bat": (a, r, r), "bat_row": (b, r, r), "bat_left": (a, r, r), "bone_free": (*tiles, r, r)}
    return variant, a * r, i, shape[variant]


def options(variant, shape):
    """The options of `Bone` that make a block of this shape."""
    more = {"mini": {"mini_r": shape[-1]}, "bone_free": {"tiles": list(shape[:2])}}
    return {"variant": variant, "r": shape[0] if variant in ADDED else shape[-1], **more.get(variant, {})}


# one shape of each form for a layer of 16 outputs and 24 inputs
SHAPES = {"bone": (5, 16), "bone_out": (3, 24), "mini": (5, 8), "bat": (2, 8, 8), "bat_row": (3, 8, 8),
          "bat_left": (4, 4, 4), "bone_free": (2, 3, 8, 8)}
