"""What a model is measured by, and how a loss of it is said in percent.

Inside, every metric is a badness: a number that is lower for a better model, so that widths add to it.
Source: EdgeMoE section III-B (Rouge-2 on a validation set); loss in percent as in its Table II.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import stdev
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from poise.errors import ConfigError, DataError

NAMES = ("cross_entropy", "accuracy", "rouge2")
Values = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """A badness, its standard error over windows (0 where it is not known), and its values of them."""

    value: float
    error: float
    values: tuple[float, ...] = ()

    def above(self, other: Measured) -> tuple[float, float]:
        """Return by how much it is worse than another one on the same windows, and the standard error."""
        apart = [a - b for a, b in zip(self.values, other.values, strict=True)]
        error = stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
        return self.value - other.value, error


@dataclass(frozen=True)
class Metric:
    """A way to measure a model.

    Parameters
    ----------
    name : str
    higher : bool
        Whether a better model has more of it.
    perplexity : bool
        Whether a loss in percent is one of exp(value).
    of_rows : callable or None
        From model and some windows (n, length + 1) to a value for each of them.
    of_model : callable or None
        From the model alone to a value.
    """

    name: str
    higher: bool = False
    perplexity: bool = False
    of_rows: Values | None = None
    of_model: Callable[[Any], float] | None = None

    def measure(self, model: Any, windows: Tensor, rows: int) -> Measured:
        """Return the badness of a model (`Served`) on windows, some rows at a time.

        Raises
        ------
        DataError
            For one that is not finite.
        """
        sign = -1.0 if self.higher else 1.0
        if self.of_model is not None:
            found = self.of_model(model)
            if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
                raise DataError(f"metric {self.name} gave {found!r}: it must be a finite number")
            return Measured(sign * float(found), 0.0)
        assert self.of_rows is not None
        values = torch.cat([self.of_rows(model, part) for part in windows.split(rows)]).double()
        if not values.isfinite().all():
            raise DataError(f"{self.name} of {int((~values.isfinite()).sum())} of {len(values)} windows is "
                            f"NaN or Inf: the model cannot be measured on these data")
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return Measured(sign * float(values.mean()), error, tuple((sign * values).tolist()))

    def percent(self, value: float, reference: float) -> float:
        """Return by how many percent of the reference a badness is worse."""
        if self.perplexity:
            return 100.0 * (math.exp(min(value - reference, 700.0)) - 1.0)
        return 100.0 * (value - reference) / abs(reference)

    def allowed(self, percent: float, reference: float) -> float:
        """Return the badness that a loss in percent allows."""
        if self.perplexity:
            return reference + math.log1p(percent / 100.0)
        return reference + abs(reference) * percent / 100.0

    def shown(self, value: float) -> float:
        """Return a badness as the metric itself has it."""
        return -value if self.higher else value

    def check_reference(self, reference: float) -> None:
        """Refuse a reference of 0, of which there are no percents."""
        if not self.perplexity and reference == 0:
            raise DataError(f"{self.name} of the model as trained is 0: a loss in percent of it says "
                            f"nothing; take another metric")


def metric_of(metric: Any, higher_is_better: bool | None = None, tokenizer: Any = None) -> Metric:
    """Return a metric by name, or one's own.

    Raises
    ------
    ConfigError
        For an unknown name; a function without its direction, and a direction that a name has already.
    """
    if isinstance(metric, str):
        if higher_is_better is not None:
            raise ConfigError(f"higher_is_better={higher_is_better} has no effect beside metric={metric}, "
                              f"which has its direction: leave it out")
        if metric == "cross_entropy":
            return Metric(metric, perplexity=True, of_rows=cross_entropy)
        if metric == "accuracy":
            return Metric(metric, higher=True, of_rows=accuracy)
        if metric == "rouge2":
            return Metric(metric, higher=True, of_rows=lambda m, w: rouge2_of(m, w, tokenizer))
    if callable(metric):
        if not isinstance(higher_is_better, bool):
            raise ConfigError("a metric of one's own needs higher_is_better=True or False")
        name = getattr(metric, "__name__", type(metric).__name__)
        return Metric(name, higher=higher_is_better, of_model=cast(Callable[[Any], float], metric))
    raise ConfigError(f"metric={metric!r} is not allowed: it must be one of {', '.join(NAMES)}, or a "
                      f"function of the model")


def halves(model: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of windows and the tokens that they should say.

    An encoder-decoder reads the first half and is asked about the second.
    """
    if model.model.config.is_encoder_decoder:
        middle = windows.shape[1] // 2
        decoded = windows[:, middle:]
        return model.logits(windows[:, :middle], decoded[:, :-1]), decoded[:, 1:]
    return model.logits(windows[:, :-1]), windows[:, 1:]


def token_losses(model: Any, windows: Tensor) -> Tensor:
    """Return the loss of every next token, in nats, (windows, tokens)."""
    logits, wanted = halves(model, windows)
    losses = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none")
    return losses.view(wanted.shape).double()


def cross_entropy(model: Any, windows: Tensor) -> Tensor:
    """Return the mean loss of the next token, in nats, of each window."""
    return token_losses(model, windows).mean(1)


def accuracy(model: Any, windows: Tensor) -> Tensor:
    """Return the share of next tokens that are the likeliest, of each window."""
    logits, wanted = halves(model, windows)
    return (logits.argmax(-1) == wanted).double().mean(1)


def rouge2_of(model: Any, windows: Tensor, tokenizer: Any) -> Tensor:
    """Return Rouge-2 of the second half of each window, said greedily after the first."""
    middle = windows.shape[1] // 2
    new = windows.shape[1] - 1 - middle
    said = model.generate(windows[:, :middle], new)[:, -new:]
    pairs = zip(said.tolist(), windows[:, middle:-1].tolist(), strict=True)
    return torch.tensor([rouge2(_words(a, tokenizer), _words(b, tokenizer)) for a, b in pairs])


def _words(ids: list[int], tokenizer: Any) -> list[Any]:
    return ids if tokenizer is None else tokenizer.decode(ids).lower().split()


def rouge2(said: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Return the F-measure of pairs of neighbouring words."""
    a, b = (Counter(pairwise(words)) for words in (said, wanted))
    common = sum((a & b).values())
    return 2.0 * common / (sum(a.values()) + sum(b.values())) if common else 0.0
