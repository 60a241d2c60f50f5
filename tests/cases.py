"""The cases of a parametrization of which the default suite takes a few, and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], keep: Collection[Any] = ()) -> list[Any]:
    """Return the cases, with those that are not in `keep` marked slow; a tuple holds several arguments.

    Raises ValueError when one to be kept is no case: nothing is left out by a slip of the pen.
    """
    every = list(cases)
    unknown = [case for case in keep if case not in every]
    if unknown:
        raise ValueError(f"{unknown} are not among the cases {every}")
    return [case if case in keep else slowly(case) for case in every]


def slowly(case: Any) -> Any:
    """Return a case that is marked slow."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
