"""One self-contained HTML page: tables and pictures of runs, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from poise.files import read_regular, write_text
from poise.report import plots
from poise.report.groups import group, varied_keys
from poise.report.loading import Found
from poise.report.tables import Table, metric_names, recipe_report, tables

_MOST_PICTURE = 1 << 26  # bytes
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-weight:600}h2{margin-top:2.2rem;border-bottom:1px solid #ddd}h3{font-size:1rem;margin-bottom:.3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;border-bottom:1px solid #eee;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}th{background:#f6f6f4}
img{max-width:100%;margin:.6rem 0}pre{background:#f6f6f4;padding:.8rem;overflow-x:auto}
p.note{color:#555}
"""


def write_page(
    target: Path | str, sections: Sequence[tuple[str, Found]],
    title: str = "Poise report", intro: str = "", closing: str = "", metrics: Sequence[str] = (),
) -> Path:
    """Write a page with one section per (heading, what was found).

    Parameters
    ----------
    target : path of the HTML file
    sections : list of (heading, Found)
    intro, closing : HTML put before and after the sections
    """
    body = [f"<h1>{html.escape(title)}</h1>", intro]
    for heading, found in sections:
        body += [f"<h2>{html.escape(heading)}</h2>", *section(found, metrics)]
    body.append(closing)
    text = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}"
        f"</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
    write_text(target, text)
    return Path(target)


def section(found: Found, metrics: Sequence[str] = ()) -> list[str]:
    """Return the HTML of some runs: tables, curves, and the figures they drew themselves."""
    runs = found.runs
    parts = [table_html(t) for t in tables(found, metrics) if t.rows]
    done = [r for r in runs if r.state == "done"]
    groups = group(done, varied_keys(runs))
    pictures = [plots.curves(groups, n) for n in ("validation_loss", "loss")]
    pictures += [plots.dots(groups, n) for n in metric_names(done, metrics)[:2]]
    parts += [image(p) for p in pictures if p]
    once = [r for g in groups.values() for r in g.agreed]
    parts += [image(data, title) for title, data in recipe_report(once)[1]]
    for run in once:
        for path in sorted((run.directory / "figures").glob("*.png")):
            parts.append(image(read_regular(path, _MOST_PICTURE), path.stem.replace("_", " ")))
    for run in runs:
        parts.append(f"<p class='note'>records: {html.escape(str(run.directory))}</p>")
    return parts


def table_html(table: Table) -> str:
    """Return a table as HTML."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in table.rows
    )
    return (
        f"<h3>{html.escape(table.title)}</h3><div class='wide'><table><tr>{head}</tr>{rows}</table>"
        f"</div>"
    )


def image(data: bytes, caption: str = "") -> str:
    """Return a PNG inlined as HTML."""
    code = base64.b64encode(data).decode()
    heading = f"<h3>{html.escape(caption)}</h3>" if caption else ""
    return f"{heading}<img alt='{html.escape(caption or 'figure')}' src='data:image/png;base64,{code}'>"
