"""From the records of runs to tables: varied choices by metrics, mean ± sd, paired differences."""

from __future__ import annotations

import csv
import fnmatch
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import ConfigError, FileError
from poise.hooks import Reported
from poise.registry import installed
from poise.report.groups import Group, group, label, varied_keys
from poise.report.loading import Found, load
from poise.report.numbers import difference, number, spread
from poise.runs.records import Run
from poise.runs.trackers import flat

SHOWN = 8  # metrics shown when none are asked for


@dataclass(frozen=True)
class Table:
    """A titled table of strings."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def render(self, form: str) -> str:
        """Return the table as terminal text, markdown or CSV."""
        return {"terminal": _terminal, "markdown": _markdown, "csv": _csv}[form](self)


def report(found: Found, form: str = "terminal", metrics: Sequence[str] = ()) -> str:
    """Return the report of all runs that were found.

    Parameters
    ----------
    form : terminal, markdown or csv
    metrics : shell patterns; without any, the first few of the runs' final metrics
    """
    return "\n\n".join(t.render(form) for t in tables(found, metrics) if t.rows)


def tables(found: Found, metrics: Sequence[str] = ()) -> list[Table]:
    """Return the summary table, paired differences, the runs' own tables, and what did not finish."""
    runs = found.runs
    done = [r for r in runs if r.state == "done"]
    names = metric_names(done, metrics)
    groups = group(done, varied_keys(runs))
    made = [summary(groups, names)]
    if len(groups) > 1:
        made.append(paired(groups, names))
    made.append(clashes(groups))
    once = [r for g in groups.values() for r in g.agreed]
    made += recipe_report(once)[0]
    made += [t for r in once[:12] for t in own_tables(r, runs)]
    return [*made, unfinished(found)]


def recipe_report(runs: Sequence[Run]) -> tuple[list[Table], list[tuple[str, bytes]]]:
    """Return what recipes themselves say over all of their runs: tables, and (title, PNG) pictures.

    A recipe may have `report(runs) -> ([(title, columns, rows)], [(title, png)])`.
    """
    found: list[Table] = []
    pictures: list[tuple[str, bytes]] = []
    for name in dict.fromkeys(str(r.config.get("recipe", {}).get("entry")) for r in runs):
        try:
            component = installed().get("recipe", name).load()
        except ConfigError:  # a plugin that is no longer installed
            continue
        if isinstance(component, Reported):
            own = [r for r in runs if r.config.get("recipe", {}).get("entry") == name]
            rows, drawn = component.report(own)
            found += [Table(*row) for row in rows]
            pictures += drawn
    return found, pictures


def metric_names(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    """Return the metrics to show, in the order the runs wrote them.

    Raises
    ------
    ConfigError
        For a pattern that matches no metric.
    """
    names = list(dict.fromkeys(n for r in runs for n in r.metrics))
    for p in patterns:
        if names and not any(fnmatch.fnmatchcase(n, p) for n in names):
            raise ConfigError(f"--metric {p} matches none of: {', '.join(names)}")
    if patterns:
        return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    preferred = ("test_accuracy", "best_test_accuracy", "loss_before", "loss_after", "test_loss",
                 "perplexity", "exact_match", "trainable_parameters", "model_bytes", "step_seconds")
    chosen = [n for n in preferred if n in names]
    return chosen or names[:SHOWN]


def summary(groups: Mapping[str, Group], names: list[str]) -> Table:
    """Return mean ± sd over seeds of every metric, a row per group."""
    rows = [[name, str(len(g.runs)), *(spread(list(g.values(n).values())) for n in names)]
            for name, g in groups.items()]
    return Table("Runs", ["choices", "runs", *names], rows)


def paired(groups: Mapping[str, Group], names: list[str]) -> Table:
    """Return differences to the first group over the seeds that both have."""
    (base_name, base), *others = groups.items()
    rows = []
    for name, other in others:
        seeds = {r.config.get("seed") for r in base.runs} & {r.config.get("seed") for r in other.runs}
        if seeds:
            rows.append([name, str(len(seeds)), *(difference(differences(base, other, n)) for n in names)])
    title = f"Paired differences to: {base_name} (same seeds; mean ± sd, t)"
    return Table(title, ["choices", "pairs", *names], rows)


def differences(base: Group, other: Group, metric: str) -> list[float]:
    """Return other minus base at every seed that both have."""
    left, right = base.values(metric), other.values(metric)
    return [right[seed] - left[seed] for seed in left if seed in right]


def clashes(groups: Mapping[str, Group]) -> Table:
    """Return which repeats of one choice and seed differ."""
    rows = [[name, _cell(c.seed), ", ".join(c.metrics), str(c.a.directory), str(c.b.directory)]
            for name, g in groups.items() for c in g.clashes]
    title = "Repeats that differ (same choices, same seed: such a metric is a dash)"
    return Table(title, ["choices", "seed", "metrics", "run", "another run"], rows)


def own_tables(run: Run, among: Sequence[Run]) -> list[Table]:
    """Return the tables that a recipe left in its notes (lists of rows), with where they are from."""
    where = "" if len(among) == 1 else f" [{run.directory.name}]"
    found = []
    for key, rows in run.notes.items():
        if isinstance(rows, list) and rows and all(isinstance(r, dict) for r in rows):
            columns = list(dict.fromkeys(k for r in rows for k in r))
            cells = [[_cell(r.get(c, "")) for c in columns] for r in rows]
            found.append(Table(f"{key}{where}", columns, cells))
    return found


def unfinished(found: Found) -> Table:
    """Return what failed, was interrupted or killed, still runs, or is a job that was never started."""
    varied = [*varied_keys(found.runs), "seed"]
    rows = [
        [str(r.directory), r.state, str(r.status.get("reason", "")), found.overrides(r) or label(r, varied)]
        for r in found.runs if r.state != "done"
    ]
    rows += [[str(path), "not started", "", words] for path, words in found.waiting.items()]
    never = f": {len(found.waiting)} of {found.jobs} jobs were never started" if found.waiting else ""
    return Table(f"Not finished{never}", ["run", "state", "reason", "overrides"], rows)


def compare(
    a: Path | str, b: Path | str, form: str = "terminal", metrics: Sequence[str] = ()
) -> str:
    """Return what differs between two runs (or folders of runs): choices, then metrics."""
    found = [load([side]) for side in (a, b)]
    if damaged := [error for side in found for error in side.damaged]:
        raise damaged[0]
    sides = [side.runs for side in found]
    for path, side in zip((a, b), sides, strict=True):
        if not side:
            raise FileError(f"{path} holds no run that was started")
        if len(kinds := group(side, varied_keys(side))) > 1:
            raise ConfigError(
                f"{path} holds {len(kinds)} kinds of runs ({'; '.join(kinds)}): compare one of them "
                f"with another, or use poise report"
            )
    left, right = (flat(side[0].config) for side in sides)
    keys = [k for k in dict.fromkeys([*left, *right]) if left.get(k) != right.get(k)]
    rows = [[k, _cell(left.get(k, "-")), _cell(right.get(k, "-"))] for k in keys]
    choices = Table("Choices that differ", ["key", str(a), str(b)], rows)
    done = [[r for r in side if r.state == "done"] for side in sides]
    names = metric_names([*done[0], *done[1]], metrics or ["*"])
    groups = {str(path): _one(runs) for path, runs in zip((a, b), done, strict=True)}
    values = Table("Metrics", ["metric", str(a), str(b), "b - a"], [
        [n, *_both(groups[str(a)], groups[str(b)], n)] for n in names
    ])
    made = [t for t in (choices, values, clashes(groups), *map(unfinished, found)) if t.rows]
    return "\n\n".join(t.render(form) for t in made) or "nothing differs, and no run is done"


def _one(runs: Sequence[Run]) -> Group:
    """Return runs of one kind as a group."""
    return next(iter(group(runs, []).values()), Group([], []))


def _both(a: Group, b: Group, name: str) -> list[str]:
    left, right = a.values(name), b.values(name)
    if common := differences(a, b, name):
        change = difference(common)
    elif left and right:
        change = number(statistics.fmean(right.values()) - statistics.fmean(left.values()))
    else:
        change = "-"
    return [spread(list(left.values())), spread(list(right.values())), change]


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _terminal(table: Table) -> str:
    """Draw with plain characters: widths fit the content, numbers right."""
    widths = [
        max(len(c), *(len(r[i]) for r in table.rows)) if table.rows else len(c)
        for i, c in enumerate(table.columns)
    ]
    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([table.title, line(table.columns), rule, *map(line, table.rows)])


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = "|" + "---|" * len(table.columns)
    return "\n".join([f"**{table.title}**", "", line(table.columns), rule, *map(line, table.rows)])


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([f"# {table.title}"])
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return out.getvalue().rstrip("\n")
