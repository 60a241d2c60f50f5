"""What the tests of profiles and allocations share: a text, small options, profiles made by hand."""

from __future__ import annotations

import random

from poise_edgemoe.widths.profile_file import Entry, Profile

SMALL = {"windows": 6, "held_out": 3, "length": 16, "group": 8}


def text(folder, paragraphs=60, seed=0, name="text.txt"):
    """Write paragraphs of made-up words; return the file."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 6))) for _ in range(40)]
    made = "\n\n".join(" ".join(draw.choices(words, k=8)) for _ in range(paragraphs))
    (folder / name).write_text(made + "\n")
    return folder / name


def trained(steps=60):
    """Return a byte model that has learned a little; it is cached."""
    from poise_edgemoe import ByteMoE

    return ByteMoE(layers=2, hidden=48, inner=96, steps=steps).build()


def by_hand(nbytes, damages, *, layers=None, reads=None, increases=None, widths=(2, 3, 4, 8, 16)):
    """Return a profile of experts of these bytes and damages by width, a row each."""
    widths, count = list(widths), len(nbytes)
    layers = layers or [0] * count
    numbers = [layers[:x].count(layer) for x, layer in enumerate(layers)]
    zeros = dict.fromkeys(widths, 0.0)
    entries = [Entry(f"l{layers[x]}.experts.{numbers[x]}", layers[x], numbers[x], ["gate_up", "down"], 1, 1,
                     reads[x] if reads else 1.0, dict(zip(widths, nbytes[x], strict=True)),
                     zeros, zeros, zeros, dict(zip(widths, damages[x], strict=True)),
                     increases[x] if increases else None)
               for x in range(count)]
    known = [{"path": f"l{n}.experts", "encoder": False, "experts": layers.count(n)}
             for n in range(max(layers) + 1)]
    return Profile({"identity": "0" * 64, "family": "mixtral", "dtype": "bfloat16", "layers": known},
                   {"widths": widths, "scheme": "asym_group", "group": 64, "rounding": "nearest",
                    "metric": "cross_entropy", "higher_is_better": False},
                   {"checksum": "", "tokens": 100}, {}, entries, [])
