"""``esper experiences``: look into a store of experiences, and turn it into a table."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_experiences", "experiences"]


def add_experiences(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their arguments."""
    commands = parser.add_subparsers(dest="experiences", metavar="WHAT", required=True)
    show = commands.add_parser("show", help="count decisions and rewards by policy")
    show.add_argument("store", type=Path, metavar="STORE", help="SQLite file of experiences")
    show.add_argument("--check", action="store_true", help="read all of the file and look for damage first")
    export = commands.add_parser("export", help="write them as a Parquet table")
    export.add_argument("store", type=Path, metavar="STORE", help="SQLite file of experiences")
    export.add_argument("out", type=Path, metavar="OUT", help="file to write, .parquet")
    export.add_argument("--policy", metavar="NAME", help="of this policy alone")


def experiences(options: argparse.Namespace) -> int:
    """Run ``esper experiences``.

    Raises:
        EsperError: There is no store, it is damaged, or pyarrow is missing.
    """
    from rich.console import Console

    from esper.tamiyo.experience.store import ExperienceStore

    console = Console(highlight=False)
    with ExperienceStore(options.store, readonly=True) as store:
        if options.experiences == "export":
            from esper.tamiyo.experience.export import export_parquet

            rows = export_parquet(store, options.out, policy=options.policy)
            console.print(f"{options.out}: {rows:,} experiences", soft_wrap=True)
            return 0
        from esper.tamiyo.experience.tables import correlation_table, policy_table, reward_correlations

        if options.check:
            store.check()
        console.print(policy_table(store.counts(), title=f"{options.store}: {len(store):,} decisions"))
        found = reward_correlations(store)
        if any(c.rho is not None for c in found):
            console.print(correlation_table(found, title="rewards and the end of the run"))
    return 0
