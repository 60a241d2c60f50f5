"""Conformance kits: what every component and every served model keeps, as checks.

Each kit runs a component through its contract and raises `ContractError` naming the first fault; it returns
the names of the checks that were made.
The project's own tests run them over every registered entry; a third party can run them too:

    from poise.testing import check_adapter
    check_adapter(MyAdapter(r=4))
"""

from __future__ import annotations

from poise.testing.adapter import check_adapter
from poise.testing.aggregator import check_aggregator
from poise.testing.data import check_data
from poise.testing.faults import ContractError
from poise.testing.model import check_model
from poise.testing.quantizer import check_quantizer
from poise.testing.served import check_served

__all__ = [
    "ContractError", "check_adapter", "check_aggregator", "check_data", "check_model", "check_quantizer",
    "check_served",
]
