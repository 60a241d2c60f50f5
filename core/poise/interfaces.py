"""The contracts. Implementing one needs no base class: having the methods is enough.

Shapes: `out, in` are a weight's rows and columns, `T` tokens, `n` rows, `p` base models,
`m` quantile levels, `d` features. `poise.testing` holds a conformance kit for each of the four
component kinds (model, quantizer, adapter, aggregator).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from poise.samples import Arrays, Example, Splits

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from poise.config import Train

# ------------------------------------------------------------------ data


@runtime_checkable
class Data(Protocol):
    """A source of splits."""

    def load(self, seed: int = 0) -> Splits:
        """Read, check and split; the same seed gives the same splits.

        Raises
        ------
        DataError
            For a missing, empty, truncated or unusable source.
        """
        ...


# ------------------------------------------------------------------ model


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@runtime_checkable
class Model(Protocol):
    """What a run trains, adapts, compresses or serves.

    `build` returns one of three forms:

    * neural: an `nn.Module`. Causal language models take `input_ids` (batch, time) and return an
      object with `logits` (batch, time, vocab); classifiers return (batch, classes).
    * quantile: an object with `levels` (m,), `fit(X, y, sample_weight=None)` and
      `predict_quantiles(X, levels=None) -> (n, m)`.
    * served: a `Served`, whose weights are its own matter.

    Which one is said by the class attribute `form`, "neural" where there is none (`form_of`). A component
    for causal language models also has `tokenizer() -> Tokenizer`; one that comes with trained weights has
    `trained = True`, which adapters that freeze their base require.
    """

    def build(self, spec: Mapping[str, Any] | None = None) -> Any:
        """Return the model; `spec` is `Splits.spec`, for sizes that follow from the data."""
        ...


FORMS = ("neural", "quantile", "served")


def form_of(component: Any) -> str:
    """Return which of `FORMS` a model component builds."""
    return getattr(component, "form", "neural")


@runtime_checkable
class Served(Protocol):
    """A language model behind calls, wherever its weights are; `with` closes it.

    Prompts are token ids (batch, time), all of one length, or one text. After `close` every call but
    `close` is refused. `poise.models.decoding.Sampling` says what `generate` and `stream` take besides.
    """

    def logits(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        """Return logits (batch, time, vocab); of an encoder-decoder model for the decoder's ids.

        Raises
        ------
        DataError
            For ids that are empty, out of range, of a wrong shape, or longer than the context.
        """
        ...

    def generate(self, prompt: Any, max_new_tokens: int, **sampling: Any) -> Any:
        """Return prompt and continuation: ids (batch, time + new) for ids, text for text."""
        ...

    def stream(self, prompt: Any, max_new_tokens: int, **sampling: Any) -> Iterator[Any]:
        """Yield what `generate` adds as it is made: tokens (batch,) for ids, pieces of text for text."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return what was measured so far as plain JSON values."""
        ...

    def close(self) -> None:
        """Give back memory, threads and files; a second time: nothing."""
        ...

    def __enter__(self) -> Served: ...

    def __exit__(self, *error: object) -> None: ...


# ------------------------------------------------------------------ quantizer


@runtime_checkable
class QuantizedTensor(Protocol):
    """Lossy storage of one matrix of shape (out, in).

    One that `quantize` returns shares no memory with the weight. One that `from_tensors` returns may be
    views of what it was given, for as long as it lives: whoever owns that buffer leaves it as it is.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """True size in bytes: codes, scales and offsets."""
        ...

    @property
    def resident_bytes(self) -> int:
        """Bytes that it takes in memory; more than `nbytes` where it keeps a kernel's own layout."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (out * in)."""
        ...

    def dequantize(self, rows: slice | None = None) -> Tensor:
        """Return output rows `rows` (all without it), shape (len(rows), in)."""
        ...

    def matmul(self, x: Tensor) -> Tensor:
        """Return x @ W.T, shape (..., out), never holding the whole W."""
        ...

    def matmul_t(self, dy: Tensor) -> Tensor:
        """Return dy @ W, shape (..., in), never holding the whole W."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name, as they go to disk."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """Makes `QuantizedTensor`s.

    One that searches for levels, and may find others for what it has quantized before, has
    `searches = True`; others may leave it out.
    """

    def quantize(self, weight: Tensor) -> Any:
        """Quantize a matrix (out, in); NaN, Inf and values that the format does not hold are refused."""
        ...

    def at(self, bits: int) -> Quantizer:
        """Return the same scheme at other bits per weight.

        Raises
        ------
        ConfigError
            In words, for bits that it does not have; a fixed format has its own and no others.
        """
        ...

    def layout(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the name, shape and type of every tensor that a matrix of this shape will be stored as.

        Known before any data is seen: a file can be laid out, and bytes counted, from shapes alone.
        """
        ...

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Any:
        """Rebuild what `tensors()` returned; it may keep these tensors instead of copies."""
        ...


# ------------------------------------------------------------------ adapter


@runtime_checkable
class Attached(Protocol):
    """An adapter on a model; several may be there, each under a name of its own.

    Adapters that freeze their base act in the order of attachment, each on the weight as the earlier
    ones leave it. One with `freezes_base = False` holds its weights alone: a second one on them,
    `active = False` and `disable()` are refused in words. `trainable`, `optimizer`, `fold` and `merge`
    concern this adapter only.
    """

    model: nn.Module
    name: str
    adapter: Any
    """The component that made it."""

    @property
    def active(self) -> bool:
        """Whether it acts; may be set."""
        ...

    def disable(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which it does not act."""
        ...

    def trainable(self) -> list[dict[str, Any]]:
        """Return torch parameter groups of all that trains, with their weight-decay rule."""
        ...

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return an optimizer of this class that drives what `trainable` returns."""
        ...

    def fold(self) -> None:
        """Put the change into the weights, in place; the output stays the same. A second time: nothing.

        Raises
        ------
        ConfigError
            Where other adapters would not act exactly as before, with the order to follow.
        """
        ...

    def unfold(self) -> None:
        """Undo `fold`; the weights are restored. Without `fold`: nothing."""
        ...

    def merge(self) -> nn.Module:
        """Put the change into plain weights for good and return the model, free of the adapter.

        Its `state_dict` and `save_pretrained` are those of the plain model; tied weights stay tied; an
        adapted packed layer becomes a plain one, other packed layers stay packed.
        """
        ...

    def detach(self) -> nn.Module:
        """Take the adapter off and return the model.

        A frozen base is bit for bit as it was before `attach`; a reparameterised weight keeps its present
        value. `requires_grad` returns when the last adapter goes.
        """
        ...

    def folded_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the plain checkpoint that `fold` would leave, tensor by tensor; the model is untouched."""
        ...

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return `folded_weights` as a dict: a whole model in memory."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the method's own tensors."""
        ...

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned, all of it or nothing."""
        ...

    def report(self) -> dict[str, Any]:
        """Return counts, bytes and diagnostics as plain JSON values."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """A change of how weights are parameterised, that trains and then folds away.

    `freezes_base` says whether all but the adapter's own tensors stop training. Options that choose layers
    are called `target_modules` (None: all that fit) and `exclude_modules` everywhere.
    """

    freezes_base: bool

    def attach(self, model: nn.Module, name: str = "default") -> Attached:
        """Attach to the matching layers, in place; the output does not change.

        Raises
        ------
        ConfigError
            When nothing matches, with candidates; when a weight cannot be represented, or another adapter
            has it to itself; when the model has an adapter of this name.
        """
        ...


# ------------------------------------------------------------------ aggregator


@runtime_checkable
class FittedAggregator(Protocol):
    """Weights of an ensemble."""

    def predict(self, Z: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
        """Combine predictions (n, p, m) into (n, m)."""
        ...

    def weights(self, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weights: (p,) coarse, (p, m) medium, (p, m, m) fine; local ones lead with n."""
        ...


@runtime_checkable
class Aggregator(Protocol):
    """Learns how to combine p quantile models.

    One whose weights depend on the features says `needs_features = True` and takes X (n, d) in `fit`,
    `predict` and `weights`.
    """

    def fit(
        self,
        Z: np.ndarray,
        y: np.ndarray,
        X: np.ndarray | None = None,
        *,
        levels: np.ndarray | None = None,
        validation: tuple[np.ndarray, ...] | None = None,
        sample_weight: np.ndarray | None = None,
    ) -> FittedAggregator:
        """Fit on predictions Z (n, p, m) and targets y (n,).

        `levels` (m,) are increasing, in (0, 1); without them k / (m + 1), k = 1..m, is meant.
        """
        ...


# ------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Parts:
    """The components of a run; those that play no role are None."""

    data: Data | None = None
    model: Model | None = None
    quantizer: Quantizer | None = None
    adapter: Adapter | None = None
    aggregator: Aggregator | None = None
    train: Train | None = None
    names: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Recipe(Protocol):
    """A whole experiment in terms of the contracts."""

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Run in a `poise.runs.context.RunContext` and return the final metrics by name."""
        ...


# ------------------------------------------------------------------ trackers


class Tracker(Protocol):
    """An optional mirror of the records."""

    def start(self, directory: Path, name: str, config: Mapping[str, Any]) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self, status: str, summary: Mapping[str, float]) -> None: ...


__all__ = [
    "FORMS", "Adapter", "Aggregator", "Arrays", "Attached", "Data", "Example", "FittedAggregator",
    "Model", "Parts", "QuantizedTensor", "Quantizer", "Recipe", "Served", "Splits", "Tokenizer", "Tracker",
    "form_of",
]
