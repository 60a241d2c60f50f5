"""`poise demo`: a short form of every experiment, then one page about what they did.

An experiment named `*_demo` takes part; plugins need do no more.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from poise.errors import ConfigError, PoiseError

NEXT = (
    ("poise list", "what is installed"),
    ("poise run", "the default: a small network on handwritten digits"),
    ("poise run experiment=compander_digits", "the full experiment, three arms by three seeds"),
    ("poise run --multirun seed=0,1,2 train.lr=1e-3,1e-2", "a sweep of your own"),
    ("poise describe adapter bone", "options, defaults and units of one entry"),
)


def main(argv: list[str]) -> int:
    """Run every demo experiment; print the path of the page. Returns 1 when one of them failed."""
    from poise.compose import experiments

    if len(argv) > 1 or any(a.startswith("-") for a in argv):
        raise ConfigError("usage: poise demo [OUTPUT DIRECTORY]")
    out = Path(argv[0] if argv else "runs/demo")
    names = [n for n in experiments() if n.endswith("_demo")]
    page = out / "index.html"
    sections: list[tuple[str, list[Path]]] = []
    failed: list[str] = []
    for i, name in enumerate(names, start=1):
        print(f"[{i}/{len(names)}] poise run experiment={name}", file=sys.stderr, flush=True)
        try:
            failed += _part(name, out, sections)
        except KeyboardInterrupt:
            done = f"; the page of what is done: {page.resolve()}" if sections else ""
            raise KeyboardInterrupt(f"interrupted in part {i} of {len(names)}{done}") from None
        if sections:
            _write(page, sections, names)  # after every part, for whoever stops here
    for line in failed:
        print(f"poise: {line}", file=sys.stderr)
    print(f"\nthe page of these runs: {page.resolve()}\n\nwhat to try next:")
    for command, what in NEXT:
        print(f"  {command:<52} {what}")
    return 1 if failed else 0


def _part(name: str, out: Path, sections: list[tuple[str, list[Path]]]) -> list[str]:
    """Run one experiment, add its section, and return what failed."""
    from poise.compose import run_all

    started = time.perf_counter()
    try:
        outcomes = run_all([f"experiment={name}", f"paths.out={out}"])
    except PoiseError as error:
        return [f"{name}: {error}"]
    if any(o.exit_code == 130 for o in outcomes):
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    print(f"    {seconds:.0f} s", file=sys.stderr, flush=True)
    heading = f"{name.removesuffix('_demo')} (short form, {seconds:.0f} s)"
    sections.append((heading, [o.run.directory for o in outcomes]))
    return [f"{name}: {o.error}" for o in outcomes if o.error is not None]


def _write(page: Path, sections: list[tuple[str, list[Path]]], names: list[str]) -> None:
    from poise.report.loading import load
    from poise.report.page import write_page

    intro = (
        "<p>Short forms of every experiment, made by <code>poise demo</code> on this machine. They "
        "show that the parts work together; their figures are too small to decide anything. The "
        "full forms: " + ", ".join(
            f"<code>poise run experiment={n.removesuffix('_demo')}</code>" for n in names) + ".</p>"
    )
    closing = "<h2>What to try next</h2><pre>" + "\n".join(
        f"{c:<52} # {w}" for c, w in NEXT) + "</pre>"
    found = [(heading, load(directories)) for heading, directories in sections]
    write_page(page, found, title="Poise: what just ran", intro=intro, closing=closing)
