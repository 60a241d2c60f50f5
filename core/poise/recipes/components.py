"""Core's recipes: what they need and do; the work is in `classify.py` and `finetune.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from poise.interfaces import Parts
from poise.options import check_options, option, options_of


@dataclass(frozen=True)
class Classify:
    """Train a classifier on images or tables and report accuracy on held-out rows.

    Test results are those of the last step, and, as `best_`, those of the checkpoint of the lowest
    validation error: let `train.checkpoint_every` equal `train.eval_every` to have every evaluation count.
    """

    normalise: bool = option(False, "give each channel (each column of a table) mean 0 and deviation 1")
    augment: str = option("none", "crop_flip: images moved by up to 4 pixels and mirrored, at random",
                          choices=("none", "crop_flip"))

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, parts: Parts) -> None:
        """Refuse parts that do not fit, before anything is loaded."""
        from poise.recipes.check import check_parts

        check_parts(parts, ("data", "model"))

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Train, evaluate, save; return the final metrics."""
        from poise.recipes.classify import run

        return run(parts, context, **options_of(self))


@dataclass(frozen=True)
class Finetune:
    """Adapt or train a causal language model; the loss is on completions only.

    `loss_before`, `loss_after` and `validation_loss` are taken on validation rows; `test_loss` and
    `exact_match` on test rows, once, at the end.
    """

    length: int = option(256, "tokens per sequence; longer examples are cut", low=8, unit="tokens")
    packing: bool = option(True, "put several examples into one sequence, attention kept apart")
    eval_examples: int = option(64, "validation and test examples that each loss is taken on", low=1)
    generate: int = option(
        0, "test examples answered by greedy generation for exact match; 0: none", low=0
    )
    new_tokens: int = option(128, "longest generated answer", low=1, unit="tokens")
    save_folded: bool = option(True, "end by writing folded/, a plain transformers directory")

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, parts: Parts) -> None:
        """Refuse parts that do not fit, before anything is loaded."""
        from poise.recipes.check import check_parts

        check_parts(parts, ("data", "model"))

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Train, evaluate, fold, save; return the final metrics."""
        from poise.recipes.finetune import run

        return run(parts, context, **options_of(self))
