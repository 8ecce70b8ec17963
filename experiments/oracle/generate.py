"""Make the oracle table: ``python experiments/oracle/generate.py SHARDS [--workers 2] [--minutes 60]``.

States that SHARDS holds are not tried again, so the same command goes on after a stop. ``--merge`` writes what there
is to experiments/oracle/table and tries nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from esper.tamiyo.environment.specs import Split
from esper.tamiyo.oracle.generate import generate, merge
from esper.tamiyo.oracle.plan import plan_states

QUOTA: dict[str, dict[Split, int]] = {
    "digits_mlp": {"train": 30, "validation": 6, "test": 6},
    "teacher_mlp": {"train": 26, "validation": 5, "test": 5},
    "picture_mlp": {"train": 24, "validation": 5, "test": 5},
    "residual_mlp": {"train": 20, "validation": 4, "test": 4},
    "shift_mlp": {"train": 26, "validation": 5, "test": 5},
    "digits_cnn": {"train": 16, "validation": 4, "test": 4},
    "text_gpt": {"train": 10, "validation": 2, "test": 2},
    "fashion_mlp": {"sealed": 8},
    "fashion_cnn": {"sealed": 6},
    "shakespeare_gpt": {"sealed": 5},
}
"""States, each of a host of its own."""

MOST_STEPS = 600
"""Longer runs are left out, but for those whose data shift."""

TABLE = Path(__file__).parent / "table"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, help="folder of finished states")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--repeats", type=int, default=2, help="orders of the data for each candidate")
    parser.add_argument("--minutes", type=float, default=None, help="begin no state later than this")
    parser.add_argument("--merge", action="store_true", help="write the table of what there is, try nothing")
    options = parser.parse_args()
    if not options.merge:
        generate(
            plan_states(QUOTA, most_steps=MOST_STEPS),
            options.shards,
            repeats=options.repeats,
            num_workers=options.workers,
            budget_s=None if options.minutes is None else 60.0 * options.minutes,
        )
    print(f"{merge(options.shards, TABLE)} states in {TABLE}")


if __name__ == "__main__":
    main()
