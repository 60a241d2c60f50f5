"""What every source of data keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from poise.interfaces import Arrays, Example, Splits
from poise.testing.faults import expect, expect_json, expect_methods

SPLITS = ("train", "validation", "test")


def check_data(data: Any, seed: int = 0) -> list[str]:
    """Run a data component through its contract.

    Returns
    -------
    list of str
        The checks that were made, in order.

    Raises
    ------
    ContractError
        Naming the first fault.
    """
    expect_methods(data, ("load",), "the data component")
    splits = data.load(seed)
    expect_methods(splits, (*SPLITS, "provenance", "spec"), "what load returns")
    again = data.load(seed)
    arrays = isinstance(splits.train, Arrays)
    for check in (CHECKS | (ARRAY_CHECKS if arrays else TEXT_CHECKS)).values():
        check(splits, again)
    return list(CHECKS | (ARRAY_CHECKS if arrays else TEXT_CHECKS))


def _parts(splits: Splits) -> dict[str, Any]:
    return {name: getattr(splits, name) for name in SPLITS}


def _rows(part: Any) -> list[bytes]:
    """Return every row of a split as bytes: features and target, or prompt and completion."""
    expect(isinstance(part, Arrays) or all(isinstance(e, Example) for e in part),
           "a split holds what is no Example, and is no Arrays")
    if isinstance(part, Arrays):
        x = np.ascontiguousarray(part.x)
        return [row.tobytes() + np.asarray(y).tobytes() for row, y in zip(x, part.y, strict=False)]
    return [f"{e.prompt}\0{e.completion}".encode() for e in part]


def _not_empty(splits: Splits, again: Splits) -> None:
    for name, part in _parts(splits).items():
        expect(len(part) > 0, f"the {name} split is empty")


def _same_again(splits: Splits, again: Splits) -> None:
    for name, part in _parts(splits).items():
        expect(_rows(part) == _rows(getattr(again, name)), f"the same seed gives another {name} split")


def _apart(splits: Splits, again: Splits) -> None:
    """No row lies in two splits; a source that repeats rows may repeat as many across splits."""
    counted = {name: Counter(_rows(part)) for name, part in _parts(splits).items()}
    repeated = sum(sum(c.values()) - len(c) for c in counted.values())
    for i, first in enumerate(SPLITS):
        for second in SPLITS[i + 1:]:
            shared = len(counted[first].keys() & counted[second].keys())
            expect(shared <= repeated, f"{shared} rows lie in both the {first} and the {second} split")


def _provenance(splits: Splits, again: Splits) -> None:
    expect(bool(splits.provenance), "provenance is empty: it says source, licence, checksums and sizes")
    expect_json(splits.provenance, "provenance")
    expect_json(splits.spec, "spec")


def _lengths(splits: Splits, again: Splits) -> None:
    for name, part in _parts(splits).items():
        expect(isinstance(part, Arrays), f"the {name} split holds another kind of rows than train")
        expect(len(part.x) == len(part.y),
               f"the {name} split has {len(part.x)} rows of features and {len(part.y)} targets")
        expect(part.x.shape[1:] == splits.train.x.shape[1:],
               f"rows of the {name} split have shape {part.x.shape[1:]}, not {splits.train.x.shape[1:]}")


def _finite(splits: Splits, again: Splits) -> None:
    for name, part in _parts(splits).items():
        for what, values in (("features", part.x), ("targets", part.y)):
            bad = int((~np.isfinite(np.asarray(values, np.float64))).sum())
            expect(not bad, f"{bad} {what} of the {name} split are NaN or Inf")


def _labels(splits: Splits, again: Splits) -> None:
    classes: Any = splits.spec.get("n_classes")
    whole = np.issubdtype(splits.train.y.dtype, np.integer)
    expect(whole == (classes is not None),
           "spec has n_classes exactly where targets are class numbers (int64)")
    if classes is None:
        return
    for name, part in _parts(splits).items():
        low, high = int(part.y.min()), int(part.y.max())
        expect(low >= 0 and high < classes,
               f"the {name} split has labels {low} to {high}, but n_classes is {classes}")


def _honest_spec(splits: Splits, again: Splits) -> None:
    shape = tuple(splits.spec.get("input_shape", ()))
    expect(shape == splits.train.x.shape[1:],
           f"spec says input_shape {shape}, rows have shape {splits.train.x.shape[1:]}")
    columns = splits.spec.get("columns")
    if columns is not None:
        expect(len(columns) == splits.train.x.shape[1],
               f"spec names {len(columns)} columns, rows have {splits.train.x.shape[1]}")


def _examples(splits: Splits, again: Splits) -> None:
    for name, part in _parts(splits).items():
        expect(isinstance(part, Sequence), f"the {name} split is no sequence")
        expect(all(e.completion for e in part), f"the {name} split has an example without a completion")


Check = Callable[[Splits, Splits], None]
CHECKS: dict[str, Check] = {
    "no empty split": _not_empty, "the same seed gives the same splits": _same_again,
    "no row in two splits": _apart, "provenance": _provenance,
}
ARRAY_CHECKS: dict[str, Check] = {
    "as many targets as rows": _lengths, "finite values": _finite, "labels within the classes": _labels,
    "an honest spec": _honest_spec,
}
TEXT_CHECKS: dict[str, Check] = {"examples with completions": _examples}
