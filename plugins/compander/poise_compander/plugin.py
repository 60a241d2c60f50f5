"""Entries of the compander plugin."""

from __future__ import annotations

TASKS = ("classification", "causal_lm", "quantile")


def register(registry) -> None:
    """Add the compander and its control arm."""
    paper = "arXiv 2306.16993"
    registry.add(
        "adapter", "compander", "poise_compander.components:WeightCompander",
        "every weight as w = a psi(v / b), arctan and others; v trains", paper=paper,
        tasks=TASKS,
    )
    registry.add(
        "adapter", "lr_matched", "poise_compander.components:LrMatched",
        "control arm: plain weights at the learning rate a compander amounts to",
        tasks=TASKS, paper=f"{paper}, control not in the paper",
    )
    registry.add(
        "adapter", "compander_paper", "poise_compander.components:PaperCompander",
        "the compander with the pair the paper chose for a model and a data set", paper=paper, tasks=TASKS,
    )
    registry.add(
        "adapter", "weight_norm", "poise_compander.components:WeightNorm",
        "for comparison: w = g v / ||v|| for each output row", paper="arXiv 1602.07868", tasks=TASKS,
    )
    registry.add(
        "adapter", "powerprop", "poise_compander.components:PowerPropagation",
        "for comparison: w = v |v|^(alpha - 1)", paper="arXiv 2110.00296", tasks=TASKS,
    )
    registry.add(
        "quantizer", "companded", "poise_compander.components:Companded",
        "levels uniform in the companded domain, dense near zero", example={"bits": 4, "group": 8},
        paper=f"{paper}, use not in the paper",
    )
    registry.add_finding("compander steps", "poise_compander.native:status")
