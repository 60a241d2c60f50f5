"""The pairs (a, b) that the paper chose, by model and data set.

Source: arXiv 2306.16993 sections IV-A to IV-C (CIFAR, TinyImageNet, ImageNet) and III-D (learned pairs).
"""

from __future__ import annotations

from typing import Any

from poise.errors import ConfigError, nearest

PAIRS: dict[tuple[str, str], tuple[float, float]] = {
    ("resnet18", "cifar10"): (1.0, 0.6),
    ("resnet34", "cifar10"): (0.8, 0.5),
    ("resnet50", "cifar10"): (1.0, 0.6),
    ("vgg16", "cifar10"): (0.7, 0.7),
    ("vgg19", "cifar10"): (0.5, 0.7),
    ("resnet18", "cifar100"): (0.6, 0.6),
    ("resnet34", "cifar100"): (0.7, 0.8),
    ("resnet50", "cifar100"): (1.0, 0.8),
    ("vgg16", "cifar100"): (0.7, 1.0),
    ("vgg19", "cifar100"): (0.7, 0.8),
    ("wrn28_10", "cifar100"): (0.7, 0.7),
    ("resnet50", "tinyimagenet"): (0.7, 0.8),
    ("resnet50", "imagenet"): (0.6, 0.7),
}
LEARNED: dict[str, Any] = {"a": 0.5, "b": 1.0, "learn": "layer", "guard": "none"}  # the compander's options


def pair(model: str, data: str) -> tuple[float, float]:
    """Return the paper's (a, b).

    Raises
    ------
    ConfigError
        For what the paper did not train, with what it did.
    """
    if (model, data) in PAIRS:
        return PAIRS[model, data]
    models = sorted({m for m, d in PAIRS if d == data})
    if not models:
        names = sorted({d for _, d in PAIRS})
        raise ConfigError(f"compander: no pair for data {data!r}{nearest(data, names)} "
                          f"(the paper has {', '.join(names)})")
    raise ConfigError(f"compander: no pair for {model!r} on {data}{nearest(model, models)} "
                      f"(the paper has {', '.join(models)})")
