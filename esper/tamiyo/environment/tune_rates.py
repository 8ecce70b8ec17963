"""Tune the learning rates of hosts: ``python -m esper.tamiyo.environment.tune_rates`` writes ``rates.json``.

Every known family's first validation hosts are trained without growth at each rate of a grid; the rule
log(rate) = intercept + slope · log(parameters) with the least mean regret, in nats of held-out loss, is kept.
Sealed families take the rule of the known family that is built alike: nothing is tuned on them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from esper.tamiyo.environment.families import KNOWN, sample_host
from esper.tamiyo.environment.plain import train_plain
from esper.tamiyo.environment.shapes import count_parameters

__all__ = ["fit_rule", "main", "sweep"]

GRID = tuple(0.0006 * 2.0**k for k in range(8))
"""Rates that are tried: 0.0006 to 0.077."""

HIGHER = {"digits_cnn": 2}
"""Families whose best rates were found at the end of the grid, so that it goes on for so many more."""

ALIKE = {"fashion_mlp": "digits_mlp", "fashion_cnn": "digits_cnn", "shakespeare_gpt": "text_gpt"}
"""Sealed family -> the known one whose rule it takes."""

_SLOPES = np.linspace(-0.8, 0.2, 11)
_PIVOT = 3000.0
"""Parameters at which intercepts are searched, so that slope and intercept do not trade off."""


def sweep(family: str, num_hosts: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Train validation hosts at every rate.

    Returns:
        Their parameters [H], ascending, and held-out losses [H, R]; a run that diverged has the worst loss of its host.
    """
    grid = _grid(family)
    sizes, losses = [], []
    for number in range(num_hosts):
        spec = sample_host(family, "validation", number)
        sizes.append(count_parameters(spec.architecture, spec.task))
        runs = [train_plain(msgspec.structs.replace(spec, learning_rate=rate)) for rate in grid]
        found = np.array([run.held_out_loss for run in runs])
        losses.append(np.where(np.isnan(found), np.nanmax(found), found))
    order = np.argsort(sizes)
    return np.array(sizes, dtype=np.float64)[order], np.stack(losses)[order]


def fit_rule(
    sizes: NDArray[np.float64], losses: NDArray[np.float64], grid: Sequence[float] = GRID
) -> dict[str, float]:
    """The rule with the least mean regret over hosts; losses between grid points are interpolated.

    Args:
        sizes: Parameters [H].
        losses: [H, R].
        grid: Rates [R].

    Returns:
        ``intercept`` and ``slope``; mean ``regret`` in nats against each host's own best rate, and that of half
        and of twice the rule's rate.
    """
    best = min(
        ((a, b) for b in _SLOPES for a in np.linspace(math.log(grid[0]), math.log(grid[-1]), 57)),
        # of rules that are equally good the flattest: fewer hosts than that speak for a slope
        key=lambda rule: (round(_regret(sizes, losses, grid, *rule), 4), abs(rule[1])),
    )
    at_pivot, slope = float(best[0]), float(best[1])
    regrets = {
        name: _regret(sizes, losses, grid, at_pivot + math.log(factor), slope)
        for name, factor in (("regret", 1.0), ("regret_of_half", 0.5), ("regret_of_twice", 2.0))
    }
    return {"intercept": at_pivot - slope * math.log(_PIVOT), "slope": slope, **regrets}


def _regret(
    sizes: NDArray[np.float64],
    losses: NDArray[np.float64],
    grid: Sequence[float],
    at_pivot: float,
    slope: float,
) -> float:
    wanted = at_pivot + slope * np.log(sizes / _PIVOT)
    reached = [np.interp(rate, np.log(grid), row) for rate, row in zip(wanted, losses, strict=True)]
    return float(np.mean(np.array(reached) - losses.min(axis=1)))


def _grid(family: str) -> tuple[float, ...]:
    return GRID + tuple(GRID[-1] * 2.0 ** (k + 1) for k in range(HIGHER.get(family, 0)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep, fit, and write the rules with the figures that they were made from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=12, help="validation hosts of each family")
    parser.add_argument(
        "--families", nargs="*", default=list(KNOWN), help="only these; others keep their rule"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("rates.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before: Mapping[str, Any] = {}
    if options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))["families"]
    families = {name: rule for name, rule in before.items() if name in KNOWN}
    for family in options.families:
        started = time.perf_counter()
        sizes, losses = sweep(family, options.hosts)
        grid = _grid(family)
        rule = fit_rule(sizes, losses, grid)
        found = {key: round(value, 5) for key, value in rule.items()}
        families[family] = {
            **found,
            "rates": [round(grid[0], 5), round(grid[-1], 5)],
            "parameters": [int(size) for size in sizes],
            "best_rates": [round(grid[i], 5) for i in losses.argmin(axis=1)],
        }
        print(f"{family}: {found} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    for sealed, known in ALIKE.items():
        if known in families:
            rule = {name: families[known][name] for name in ("intercept", "slope", "rates", "parameters")}
            families[sealed] = {**rule, "as": known}
    written = {"torch": torch.__version__, "families": families}
    options.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
