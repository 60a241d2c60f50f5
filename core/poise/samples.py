"""What data sources give: rows, pieces of text, and their splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Arrays:
    """Rows with a target: tables and images.

    Parameters
    ----------
    x : array, shape (n, d) float64 for tables, (n, channels, height, width) float32 for images
    y : array, shape (n,), float64 for regression, int64 class indices for classification
    """

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Example:
    """One piece of text; the loss of fine-tuning is taken on the completion only.

    Parameters
    ----------
    prompt : str
        What the model is given; empty for plain text.
    completion : str
        What it should continue with.
    answer : str
        The final answer to compare with by exact match; empty when there is none.
    """

    prompt: str
    completion: str
    answer: str = ""


@dataclass(frozen=True)
class Splits:
    """What `Data.load` returns.

    Parameters
    ----------
    train, validation, test : Arrays, or sequence of Example
    provenance : dict
        Source, licence, checksums, sizes, what was done to the data (plain JSON values).
    spec : dict
        What a model needs to know: `input_shape` and `n_classes` for images and tables,
        `columns` and `target` for tables.
    """

    train: Any
    validation: Any
    test: Any
    provenance: dict[str, Any]
    spec: dict[str, Any] = field(default_factory=dict)
