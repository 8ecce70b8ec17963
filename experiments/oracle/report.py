"""Print the tables of experiments/oracle/README.md: ``python experiments/oracle/report.py [TABLE]``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from esper.report.statistics import Estimate
from esper.tamiyo.environment.specs import SPLITS
from esper.tamiyo.oracle.analysis import PRICES
from esper.tamiyo.oracle.records import StateRecord
from esper.tamiyo.oracle.rules import RULES
from esper.tamiyo.oracle.survey import IN_SAMPLE, ORACLE, UNTUNED, Survey, survey
from esper.tamiyo.oracle.table import read_table

TABLE = Path(__file__).parent / "table"


def main() -> None:
    records = read_table(Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE)
    found = survey(records)
    sizes(records)
    for (price, within), value in found.reliability.items():
        print(f"reliability at λ = {price:g}{', within states' if within else ''}: {value:.3f}")
    print()
    headroom(found)
    for split in (UNTUNED, "test", "sealed"):
        for price in (0.0, 0.1):
            rules(found, split, price)


def sizes(records: Sequence[StateRecord]) -> None:
    """States by family and split, and what they cost."""
    table("family", *SPLITS, "moments", "candidates a state", "runs", "core-minutes")
    for family in dict.fromkeys(record.family for record in records):
        own = [record for record in records if record.family == family]
        runs = [outcome for record in own for outcome in record.outcomes]
        moments = Counter(record.moment for record in own)
        tried = sum(len(record.outcomes) / record.num_repeats for record in own) / len(own)
        row(
            family,
            *(sum(record.split == split for record in own) for split in SPLITS),
            ", ".join(f"{num} {moment}" for moment, num in moments.most_common()),
            f"{tried:.1f}",
            len(runs),
            f"{sum(run.wall_time_s for run in runs) / 60:.0f}",
        )
    every = [outcome for record in records for outcome in record.outcomes]
    bad = Counter("failed" if o.error else "refused" if o.refused else "" for o in every)
    print(
        f"\n{len(records)} states, {len(every)} runs, {bad['failed']} failed, {bad['refused']} with refusals\n"
    )


def headroom(found: Survey) -> None:
    """Oracle, best rule of the validation split, and what lies between."""
    for price in PRICES:
        print(f"λ = {price:g}\n")
        table(
            "states",
            "hosts",
            "oracle",
            "median",
            "best rule",
            "it gains",
            "headroom",
            "without shortcut",
            "WAIT best",
        )
        for split, family in dict.fromkeys((r.split, r.family) for r in found.rows):
            oracle = found.row(split, family, price, True, ORACLE).judgement
            rule = found.row(split, family, price, True)
            bare = found.row(split, family, price, False).judgement
            row(
                f"{split} {family}".strip(),
                oracle.utility.num,
                interval(oracle.utility),
                f"{found.row(split, family, price, True, IN_SAMPLE).judgement.utility.mean:.3f}",
                f"{oracle.median:.3f}",
                f"{rule.chooser}({rule.options})",
                interval(rule.judgement.utility),
                interval(rule.judgement.regret),
                interval(bare.regret),
                f"{found.wait_share[split, family, price]:.2f}",
            )
        print()


def rules(found: Survey, split: str, price: float) -> None:
    """Every rule on one split."""
    print(f"{split}, λ = {price:g}\n")
    table(
        "chooser",
        "options",
        "gain",
        "median",
        "regret",
        "accuracy",
        "strict",
        "waits",
        "gain without shortcut",
    )
    for name in (IN_SAMPLE, ORACLE, *RULES):
        own = found.row(split, "", price, True, name)
        bare = found.row(split, "", price, False, name).judgement.utility.mean
        judged = own.judgement
        row(
            f"**{name}**" if own.best else name,
            own.options,
            interval(judged.utility),
            f"{judged.median:.3f}",
            f"{judged.regret.mean:.3f}",
            f"{judged.accuracy.mean:.2f}",
            f"{judged.strict.mean:.2f}",
            f"{judged.wait:.2f}",
            f"{bare:.3f}",
        )
    print()


def interval(estimate: Estimate) -> str:
    """Mean with its interval."""
    if estimate.interval is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} [{estimate.interval[0]:.3f}, {estimate.interval[1]:.3f}]"


def table(*heads: str) -> None:
    """Begin a table."""
    row(*heads)
    row(*("---" for _ in heads))


def row(*cells: object) -> None:
    """A row of it."""
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
