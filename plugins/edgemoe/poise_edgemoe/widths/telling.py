"""What commands say while they measure, and in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from poise.runs.progress import parts
from poise_edgemoe.widths.plan import Plan
from poise_edgemoe.widths.profile_file import Profile


@contextmanager
def telling() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of what is being done, parts that are done, and all; a stage is shown by itself."""
    with ExitStack() as shown:
        now: list[Any] = ["", None]

        def tell(label: str, done: int, of: int) -> None:
            if label != now[0]:
                shown.close()
                now[:] = [label, shown.enter_context(parts(label))]
            now[1](done, of)

        yield tell


def about_profile(made: Profile, path: str) -> str:
    """Return what should be known of a profile: losses of uniform widths, and its notes."""
    measured = made.measured
    rows = [f"{path}: {len(made.entries)} of {made.model['family']}, {made.data['tokens']} tokens; "
            f"{made.options['metric']} of the model as trained and at one width", "",
            f"  {'':10} {'MB':>10} {'calibration':>12} {'held out':>10}"]
    for name in ["reference", *map(str, made.widths)]:
        size = "" if name == "reference" else f"{sum(e.nbytes[int(name)] for e in made.entries) / 1e6:.2f}"
        sign = -1 if made.options["higher_is_better"] else 1
        a, b = (sign * measured[half][name]["badness"] for half in ("calibration", "held_out"))
        rows.append(f"  {'as trained' if name == 'reference' else name + ' bits':10} {size:>10} {a:>12.4f} "
                    f"{b:>10.4f}")
    return "\n".join([*rows, *(f"  note: {n}" for n in made.notes)])


def about_plan(plan: Plan, path: str) -> str:
    """Return what a plan costs and loses."""
    r, widths = plan.report, Counter(plan.values())
    counted = ", ".join(f"{n} at {b}" for b, n in sorted(widths.items()))
    rows = [f"{path}: {r['method']}, matrices by bits: {counted}",
            f"  {r['bytes'] / 1e6:.2f} MB of experts, {r['reads'] / 1e6:.3f} MB of them for a token; "
            f"damage {r['damage']:.3g}, no plan of this cost is below {r['bound']:.3g}"]
    if found := r["verified"]:
        for half, name in (("calibration", "calibration"), ("held_out", "held out")):
            one = found[half]
            rows.append(f"  {name}: loss {one['loss_percent']:.3g} % ({one['metric']:.4f}, standard error "
                        f"{one['standard_error']:.2g})")
        if not r["additive"]["within"]:
            rows.append(f"  note: damages sum up to {r['additive']['predicted']:.3g}, and "
                        f"{r['additive']['measured']:.3g} was measured")
    else:
        rows.append("  not measured: the model or its data are not at hand")
    if "met" in r and not r["met"]:
        rows.append("  note: no measured plan keeps the loss but the widest, which this is")
    for a, b in r.get("paper", {}).get("not_monotone", []):
        rows.append(f"  note: the loss falls from K={a} to K={b}: it is noisy on these data")
    return "\n".join(rows)
