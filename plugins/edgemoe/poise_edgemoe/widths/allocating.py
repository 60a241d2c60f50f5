"""Allocation: which width each expert gets, for a budget of bytes or of loss, measured and put right.

Source: EdgeMoE section III-B (`paper.py`); greedy on the hull, exact program, bound: `solving.py`, ours.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import ConfigError
from poise_edgemoe.budget import parse_bytes
from poise_edgemoe.widths.choice import Choice, Limits, as_plan, table_of
from poise_edgemoe.widths.paper import PAPER_WIDTHS, by_budget, by_loss
from poise_edgemoe.widths.plan import Plan
from poise_edgemoe.widths.profile_file import Profile, load_profile
from poise_edgemoe.widths.solving import Table, bound, exact, exact_for, hull, hull_for
from poise_edgemoe.widths.verifying import Verifier, verifier

METHODS = ("hull", "exact", "paper")
OBJECTIVES = ("bytes", "reads")
ROUNDS = 3  # of putting a budget of damage right
FAR = 2.0  # by how much the sum of damages may miss what was measured
Tell = Callable[[str, int, int], None]


def allocate(
    profile: Profile | Path | str, *, bytes: str | int | None = None, loss: str | float | None = None,
    method: str = "hull", objective: str = "bytes", min_bits: int | None = None, ends: int | None = None,
    model: Any = None, data: Any = None, metric: Any = None, verify: bool | None = None,
    memory: str | int | None = None, fill: bool = False, progress: Tell | None = None,
) -> Plan:
    """Choose a width for each expert.

    Parameters
    ----------
    profile : Profile or path
    bytes : str or int, optional
        The budget: most bytes of `experts.bin`; with `objective="reads"`, most bytes of experts that a
        token reads when none is in memory.
    loss : str or float, optional
        The budget: most loss of the whole model in percent of the one as trained, "2%" or 2.0; of
        perplexity for cross-entropy. One of the two.
    method : "hull", "exact" or "paper"
        Upgrades by damage removed per byte; the best choice; the paper's, the least important experts at
        the lower of two neighbouring widths.
    objective : "bytes" or "reads"
        What is spent, or saved: bytes on disk, or bytes read.
    min_bits : int, optional
        No expert gets fewer.
    ends : int, optional
        No expert of the first and the last layer gets fewer (4 is usual).
    model, data : optional
        Where they have moved since the profile, or live ones.
    metric : callable, optional
        The function, where the profile's metric is one's own.
    verify : bool, optional
        Whether the plan is measured; None: where model and data are at hand. A loss, and the paper's way by
        loss, need it.
    memory : str or int, optional
        Most bytes of the engine that measures.
    fill : bool
        Of "hull": go on after an upgrade that does not fit; plans of larger budgets may then be no larger.
    progress : callable, optional
        Told what is being done, how many parts are done, and all.

    Returns
    -------
    Plan
        Names of experts' matrices to bits, with a report.

    Raises
    ------
    ConfigError
        For an option that is not allowed, a budget that cannot be reached, with the range that can; another
        model or other data than the profile's.
    """
    found = profile if isinstance(profile, Profile) else load_profile(profile)
    limits = _checked(found, bytes, loss, method, objective, min_bits, ends, fill)
    budget = parse_bytes(bytes) if bytes is not None else 0
    percent = percent_of(loss) if loss is not None else 0.0
    needed = loss is not None
    with ExitStack() as stack:
        measure = None
        if needed or verify is not False:
            measure = verifier(stack, found, model, data, metric, memory, progress or _untold,
                               needed=needed or bool(verify))
        ask = _Ask(found, limits, method, objective, fill, measure)
        if bytes is not None:
            return _within(ask, budget)
        return _reaching(ask, percent)


def _untold(label: str, done: int, of: int) -> None:
    """Tell nobody."""


@dataclass
class _Ask:
    """What is asked for."""

    profile: Profile
    limits: Limits
    method: str
    objective: str
    fill: bool
    measure: Verifier | None
    report: dict[str, Any] = field(default_factory=dict)


def percent_of(loss: Any) -> float:
    """Return a loss in percent from "2%", "2" or 2.0.

    Raises
    ------
    ConfigError
        For what is no number above 0.
    """
    text = str(loss).strip().removesuffix("%")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if isinstance(loss, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"loss={loss!r} is not allowed: it must be a number of percent above 0, as 2%")
    return value


def _checked(
    profile: Profile, bytes: Any, loss: Any, method: str, objective: str, min_bits: Any, ends: Any,
    fill: bool,
) -> Limits:
    if (bytes is None) == (loss is None):
        both = "neither bytes nor loss is given" if bytes is None else "bytes and loss are both given"
        raise ConfigError(f"{both}: give one of them, the budget")
    for name, value, known in (("method", method, METHODS), ("objective", objective, OBJECTIVES)):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is not allowed: it must be one of {', '.join(known)}")
    if fill and (method != "hull" or bytes is None):
        raise ConfigError("fill=True has no effect: it is of method=hull with a budget of bytes; leave it "
                          "out")
    for name, value in (("min_bits", min_bits), ("ends", ends)):
        if value is not None and (isinstance(value, bool) or value not in profile.widths):
            raise ConfigError(f"{name}={value!r} is none of the profile's widths "
                              f"{', '.join(map(str, profile.widths))}")
    return Limits(min_bits, ends)


# ------------------------------------------------------------------ a budget of bytes


def _within(ask: _Ask, budget: int) -> Plan:
    """Return the plan of least damage within a budget of cost."""
    choice = table_of(ask.profile, ask.limits, ask.objective)
    spend = budget * choice.unit
    if ask.method == "paper":
        choice = table_of(ask.profile, ask.limits, ask.objective, PAPER_WIDTHS)
        chosen, said = by_budget(ask.profile, choice, spend)
        ask.report["paper"] = said
    else:
        chosen = _solved(choice, lambda: exact(choice.table, spend) if ask.method == "exact"
                         else hull(choice.table, spend, fill=ask.fill))
    ask.report |= {"budget": {"bytes": budget, "objective": ask.objective}}
    _report_solution(ask, choice, chosen, spend)
    measured = _verified(ask, choice, chosen)
    return as_plan(ask.profile, choice, chosen, {**ask.report, "method": ask.method, **measured})


def _solved(choice: Choice, solve: Callable[[], np.ndarray]) -> np.ndarray:
    """Return a choice within a budget, or say which budgets there are."""
    try:
        return solve()
    except ConfigError as error:
        least, most = choice.table.cost.min(1).sum(), choice.table.cost.max(1).sum()
        raise ConfigError(f"{error.args[0].split(':')[0]}: reachable are {least // choice.unit} to "
                          f"{most // choice.unit} bytes {choice.what}") from None


def _report_solution(ask: _Ask, choice: Choice, chosen: np.ndarray, spend: int) -> None:
    """Say what the choice costs and damages, and how far it is from the best that there could be."""
    damage = choice.table.total(chosen)[1]
    floor = bound(choice.table, spend)
    ask.report |= {"bytes": choice.nbytes(chosen), "reads": choice.reads(chosen), "damage": damage,
                   "bound": floor, "gap": max(0.0, damage - floor)}


def _verified(ask: _Ask, choice: Choice, chosen: np.ndarray) -> dict[str, Any]:
    """Return what was measured of a choice, and whether the sum of damages says the same."""
    if ask.measure is None:
        return {"verified": None}
    found = ask.measure.full(choice.bits(chosen))
    truth, summed = found["calibration"]["increase"], choice.table.total(chosen)[1]
    ratio = summed / truth if truth > 0 else float("inf")
    return {"verified": found, "additive": {"predicted": summed, "measured": truth,
                                            "within": bool(1 / FAR <= ratio <= FAR)}}


# ------------------------------------------------------------------ a budget of loss


def _reaching(ask: _Ask, percent: float) -> Plan:
    """Return the cheapest plan whose measured loss is within a limit."""
    assert ask.measure is not None
    ask.report["budget"] = {"loss_percent": percent, "objective": ask.objective}
    if ask.method == "paper":
        choice = table_of(ask.profile, ask.limits, ask.objective, PAPER_WIDTHS)
        chosen, said = by_loss(ask.profile, choice, percent, ask.measure)
        ask.report["paper"] = said
        return _finished(ask, choice, chosen)
    choice = table_of(ask.profile, ask.limits, ask.objective)
    allowed = ask.measure.allowed(percent)
    widest = choice.table.damage.argmin(1)
    _refuse_unreachable(ask, choice, widest, percent)
    budget, best, rounds = allowed, widest, []
    for _ in range(ROUNDS + 1):
        chosen = _for(ask, choice.table, budget)
        truth = ask.measure.increase(choice.bits(chosen))
        summed = choice.table.total(chosen)[1]
        rounds.append({"damage_budget": budget, "predicted": summed, "measured": truth,
                       "bytes": choice.nbytes(chosen)})
        if truth <= allowed and choice.table.total(chosen)[0] < choice.table.total(best)[0]:
            best = chosen
        near = truth > 0 and 1 / FAR <= summed / truth <= FAR
        if truth <= allowed and (near or choice.table.total(chosen)[0] == choice.table.cost.min(1).sum()):
            break
        budget *= 0.9 * allowed / truth if near else _ratio(summed, truth)
    ask.report |= {"rounds": rounds, "met": any(r["measured"] <= allowed for r in rounds)}
    return _finished(ask, choice, best)


def _ratio(summed: float, truth: float) -> float:
    """Return what a budget of damage is multiplied by where the sum misses the truth; not too bold."""
    return min(max(summed, 1e-12) / truth, FAR**2) if truth > 0 else FAR**2


def _for(ask: _Ask, table: Table, budget: float) -> np.ndarray:
    solve = exact_for if ask.method == "exact" else hull_for
    return solve(table, max(budget, float(table.damage.min(1).sum())))


def _refuse_unreachable(ask: _Ask, choice: Choice, widest: np.ndarray, percent: float) -> None:
    """Refuse a loss that the widest widths do not keep."""
    assert ask.measure is not None
    best = ask.measure.percent(choice.bits(widest))
    if best > percent:
        worst = ask.measure.percent(choice.bits(choice.table.least))
        raise ConfigError(f"loss={percent:g}% cannot be reached: reachable are {best:.4g}% (widest) to "
                          f"{worst:.4g}% (narrowest) of {ask.measure.metric.name}")


def _finished(ask: _Ask, choice: Choice, chosen: np.ndarray) -> Plan:
    assert ask.measure is not None
    _report_solution(ask, choice, chosen, choice.table.total(chosen)[0])
    measured = _verified(ask, choice, chosen)
    return as_plan(ask.profile, choice, chosen, {**ask.report, "method": ask.method, **measured})
