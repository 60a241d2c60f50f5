"""`poise data`: which data are here, under what licence, and how to get the rest."""

from __future__ import annotations

from poise.errors import ConfigError


def main(argv: list[str]) -> int:
    """Print the inventory; `--check` verifies checksums."""
    from rich.table import Table

    from poise.cli.console import console
    from poise.data.packaged import inventory

    if [a for a in argv if a != "--check"]:
        raise ConfigError("usage: poise data [--check]")
    check = "--check" in argv
    table = Table("data", "here", "licence", "where, or how to get it")
    for item in inventory(check=check):
        here = {True: "yes", False: "no"}[item["present"]]
        if check and item["present"]:
            here = {True: "yes, checked", False: "ALTERED", None: "yes"}[item.get("checksum_ok")]
        table.add_row(
            item["name"], here, item["licence"],
            str(item["path"]) if item["present"] else item["how"],
        )
    console().print(table)
    return 0
