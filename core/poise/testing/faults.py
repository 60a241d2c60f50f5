"""How a kit names a fault."""

from __future__ import annotations

import json
from typing import Any

from poise.errors import PoiseError


class ContractError(AssertionError):
    """A component breaks its contract; the message names the fault."""


def expect(holds: bool, fault: str) -> None:
    """Raise `ContractError` with the fault unless the condition holds."""
    if not holds:
        raise ContractError(fault)


def expect_methods(value: Any, methods: tuple[str, ...], what: str) -> None:
    """Check that a value has the methods and attributes of its contract."""
    missing = [m for m in methods if not hasattr(value, m)]
    expect(not missing, f"{what} lacks {', '.join(missing)}")


def expect_refusal(action: Any, fault: str) -> None:
    """Check that an action raises one of Poise's own errors."""
    try:
        action()
    except PoiseError:
        return
    except Exception as error:
        raise ContractError(
            f"{fault}: it raises {type(error).__name__} instead of one of Poise's errors"
        ) from error
    raise ContractError(fault)


def expect_json(value: Any, what: str) -> None:
    """Check that a value is made of plain JSON values."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise ContractError(f"{what} holds what JSON cannot: {error}") from None
