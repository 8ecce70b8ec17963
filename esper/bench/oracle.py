"""How much is there to choose, and how much of it do fixed rules get? Read off a table of tried candidates.

The table in experiments/oracle holds decision points of real trainings, each with the end of the run after every
candidate. Nothing is trained here, so a run takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from esper.bench._record import write_record

__all__ = ["TARGETS", "TITLE", "run"]

TITLE = "Oracle: the best candidate of each decision point, and what fixed rules lose to it"
TARGETS: dict[str, tuple[str, float]] = {"reliability_0": (">=", 0.9)}
"""GROWTH.md §6 had .93-.97 with four repeats."""

TABLE = Path("experiments/oracle/table")


def run(
    *, table: str = "", prices: Sequence[float] = (0.0, 0.03, 0.1, 0.3), quick: bool = False, out: str = ""
) -> dict[str, float]:
    """Judge the oracle and the rules on a table.

    Args:
        table: Folder of the table; empty for the committed one, below the working directory.
        prices: λ, utility lost per unit of log parameters.
        quick: At a price of 0 alone.
        out: Write a row for every chooser, split, family and price to this JSON file.

    Returns:
        ``states`` and ``runs``; ``reliability_L`` and ``reliability_within_L`` at price L. For each split S, with
        utilities in nats against WAIT as means over hosts: ``S_states``, ``S_hosts``, ``S_L_oracle`` (picked on
        half of the repeats, scored on the other half) and ``S_L_oracle_in_sample``, ``S_L_rule`` (the rule that is
        best on the validation split), ``S_L_headroom`` between the oracle and it with ``_low`` and ``_high``, the
        medians over states ``S_L_oracle_median`` and ``S_L_rule_median``, ``S_L_accuracy`` of that rule and
        ``S_L_oracle_accuracy``, ``S_L_wait_best`` (share of states in which no action pays on a second look), and
        ``S_L_headroom_no_shortcut``.

    Raises:
        DataNotFoundError: There is no table.
        DataFormatError: It was changed, or lacks a validation split.
        MissingExtraError: pyarrow is not installed.
    """
    from esper.tamiyo.oracle.splits import of_split
    from esper.tamiyo.oracle.survey import IN_SAMPLE, UNTUNED, survey
    from esper.tamiyo.oracle.table import read_table

    records = read_table(Path(table) if table else TABLE)
    if quick:
        prices = (0.0,)
    found = survey(records, tuple(prices))
    figures: dict[str, float] = {
        "states": len(records),
        "runs": sum(len(record.outcomes) for record in records),
    }
    for (price, within), value in found.reliability.items():
        figures[f"reliability_{'within_' if within else ''}{price:g}"] = value
    for split in dict.fromkeys(row.split for row in found.rows if row.split != UNTUNED):
        own = of_split(records, split)
        figures[f"{split}_states"] = len(own)
        figures[f"{split}_hosts"] = len({record.host_key for record in own})
        for price in prices:
            oracle = found.row(split, "", price, True, "oracle").judgement
            rule = found.row(split, "", price, True).judgement
            low, high = rule.regret.interval or (math.nan, math.nan)
            bare = found.row(split, "", price, False).judgement
            figures |= {
                f"{split}_{price:g}_{name}": value
                for name, value in (
                    ("oracle", oracle.utility.mean),
                    ("oracle_in_sample", found.row(split, "", price, True, IN_SAMPLE).judgement.utility.mean),
                    ("oracle_median", oracle.median),
                    ("rule", rule.utility.mean),
                    ("rule_median", rule.median),
                    ("headroom", rule.regret.mean),
                    ("headroom_low", low),
                    ("headroom_high", high),
                    ("headroom_no_shortcut", bare.regret.mean),
                    ("accuracy", rule.accuracy.mean),
                    ("oracle_accuracy", oracle.accuracy.mean),
                    ("wait_best", found.wait_share[split, "", price]),
                )
            }
    if out:
        rows = [row.plain() for row in found.rows]
        write_record(out, benchmark="oracle", options={"prices": list(prices)}, figures=figures, runs=rows)
    return figures
