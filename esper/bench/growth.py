"""Does growth help a badly shaped MLP, which policy helps most, and through which lifecycle?

Digits hosts of four hidden layers with random widths. Every arm trains the same host from the same weights
on the same batches under the same schedule, with the same limit on parameters; its control is the untouched
host, the same at twice the learning rate, and a net of equal depth, uniform width and the arm's own final
size, trained from the start. Differences are paired by host, with percentile bootstrap intervals. Which arm
becomes the default is read off the validation split; the test split is only reported.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from esper.bench._record import write_record
from esper.bench._workers import run_all
from esper.errors import ConfigError
from esper.report.statistics import Estimate, mean, paired_difference
from esper.tamiyo.config import DEFAULT_POLICY

if TYPE_CHECKING:
    from esper.bench._digits_arms import DigitsRun

__all__ = ["TARGETS", "TITLE", "random_widths", "run"]

TITLE = "Growth of badly shaped digits MLPs: every policy against off, twice the rate, and a uniform net"
TARGETS: dict[str, tuple[str, float]] = {f"{DEFAULT_POLICY}_gain_loss_low": (">", 0.0)}
"""Lower end of the interval of the test loss that the default policy takes off the untouched host's."""

POLICIES = ("random", "dimensions", "narrowest", "cond", "shortcut", "schedule", "expressivity")
MODES = ("direct", "isolated")

_DEPTH = 4
_WIDTHS = (3, 32)

Row = Mapping[str, Any]


def run(
    *,
    num_hosts: int = 20,
    epochs: int = 40,
    policies: Sequence[str] = POLICIES,
    modes: Sequence[str] = MODES,
    first_host: int = 0,
    num_workers: int = 2,
    quick: bool = False,
    out: str = "",
) -> dict[str, float]:
    """Train all arms on all hosts.

    Args:
        num_hosts: Hosts, each with its own widths, weights and data order.
        epochs: Of every run.
        policies: To compare.
        modes: Lifecycles to try each policy with; the first one's figures carry no suffix.
        first_host: Number of the first host; other hosts than those reported serve for trying things out.
        num_workers: Processes; 0 runs everything in this one.
        quick: Three hosts, ten epochs, the first lifecycle alone.
        out: Write every run to this JSON file.

    Returns:
        For each arm ``A`` (a policy, with ``_isolated`` for the second lifecycle; ``lr2``): ``A_test_loss``,
        ``A_test_acc``, ``A_val_loss``, ``A_parameters`` (means), ``A_gain_loss`` (test loss of ``off`` minus the
        arm's) and ``A_gain_acc`` (points) with ``_low`` and ``_high``, ``A_vs_uniform_loss`` (test loss of the
        uniform net of its size minus the arm's) with ``_low`` and ``_high``; ``off_...``; ``num_failed``.

    Raises:
        ConfigError: A policy that is not known, or too few hosts.
    """
    from esper.bench._digits_arms import DigitsRun, quiet_worker, train_digits
    from esper.tamiyo.policies import make_policy

    if quick:
        num_hosts, epochs, modes = min(num_hosts, 3), min(epochs, 10), modes[:1]
    if num_hosts < 2 or not modes:
        raise ConfigError(f"growth compares over at least two hosts and one mode, got {num_hosts}, {modes}")
    for policy in policies:
        make_policy(policy)
    runs: list[DigitsRun] = []
    for host in range(first_host, first_host + num_hosts):
        plain = DigitsRun("off", host, random_widths(host), epochs=epochs)
        runs += [plain, replace(plain, arm="lr2", lr_factor=2.0)]
        runs += [
            replace(plain, arm=policy + _suffix(mode, modes), policy=policy, mode=mode)
            for policy in policies
            for mode in modes
        ]
    rows = run_all(train_digits, runs, title="grow", num_workers=num_workers, prepare=quiet_worker)
    sized = _uniform_runs(rows, epochs)
    uniform = run_all(
        train_digits, list(sized.values()), title="uniform", num_workers=num_workers, prepare=quiet_worker
    )
    by_shape = dict(zip(sized, uniform, strict=True))
    figures = _figures(rows, by_shape)
    figures["num_failed"] = float(sum("error" in row for row in [*rows, *uniform]))
    _show(rows, figures)
    if out:
        options = {"num_hosts": num_hosts, "epochs": epochs, "modes": list(modes), "first_host": first_host}
        write_record(out, benchmark="growth", options=options, figures=figures, runs=[*rows, *uniform])
    return figures


def random_widths(host: int) -> tuple[int, ...]:
    """Hidden widths of host number ``host``, each log-uniform between 3 and 32."""
    draw = random.Random(f"growth-{host}")
    low, high = (math.log(width) for width in _WIDTHS)
    return tuple(round(math.exp(draw.uniform(low, high))) for _ in range(_DEPTH))


def _suffix(mode: str, modes: Sequence[str]) -> str:
    return "" if mode == modes[0] else f"_{mode}"


def _uniform_shape(row: Row) -> tuple[int, tuple[int, ...]]:
    from esper.hosts import MLPConfig

    host = MLPConfig(hidden=tuple(row["hidden"]))
    return row["host"], host.uniform_like(row["parameters"]).hidden


def _uniform_runs(rows: Sequence[Row], epochs: int) -> dict[tuple[int, tuple[int, ...]], DigitsRun]:
    """One uniform net for every size that some arm ended with, on the host's seed."""
    from esper.bench._digits_arms import DigitsRun

    shapes = {_uniform_shape(row) for row in rows if "error" not in row}
    return {key: DigitsRun("uniform", key[0], key[1], epochs=epochs) for key in sorted(shapes)}


def _figures(rows: Sequence[Row], uniform: Mapping[tuple[int, tuple[int, ...]], Row]) -> dict[str, float]:
    done = [row for row in rows if "error" not in row]
    arms = {row["arm"]: [r for r in done if r["arm"] == row["arm"]] for row in done}
    off = {row["host"]: row for row in arms.get("off", [])}
    figures: dict[str, float] = {}
    for arm, members in arms.items():
        for name in ("test_loss", "test_acc", "val_loss", "parameters"):
            figures[f"{arm}_{name}"] = mean([row[name] for row in members])
        own = {row["host"]: row for row in members}
        peers = {row["host"]: uniform[_uniform_shape(row)] for row in members}
        peers = {host: row for host, row in peers.items() if "error" not in row}
        if arm != "off":
            _difference(figures, f"{arm}_gain_loss", off, own, "test_loss", 1.0)
            _difference(figures, f"{arm}_gain_val_loss", off, own, "val_loss", 1.0)
            _difference(figures, f"{arm}_gain_acc", off, own, "test_acc", -100.0)
        _difference(figures, f"{arm}_vs_uniform_loss", peers, own, "test_loss", 1.0)
        _difference(figures, f"{arm}_vs_uniform_acc", peers, own, "test_acc", -100.0)
    return figures


def _difference(
    figures: dict[str, float], name: str, a: Mapping[int, Row], b: Mapping[int, Row], what: str, scale: float
) -> None:
    """Put ``scale * (a - b)`` with its interval into ``figures``: positive where ``b`` is the better one."""
    estimate: Estimate | None = paired_difference(
        {host: scale * row[what] for host, row in a.items()},
        {host: scale * row[what] for host, row in b.items()},
    )
    if estimate is None:
        return
    figures[name] = estimate.mean
    if estimate.interval is not None:
        figures[f"{name}_low"], figures[f"{name}_high"] = estimate.interval


def _show(rows: Sequence[Row], figures: Mapping[str, float]) -> None:
    """Print one line an arm, best validation loss first, on standard error."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title="means over hosts; differences paired, 95 % bootstrap",
        title_justify="left",
    )
    for column in ("arm", "val loss", "test loss", "accuracy", "parameters", "loss: off - arm", "points over off",
                   "loss: uniform - arm"):  # fmt: skip
        table.add_column(column, justify="left" if column == "arm" else "right")
    arms = {row["arm"] for row in rows if "error" not in row}
    for arm in sorted(arms, key=lambda arm: figures[f"{arm}_val_loss"]):
        table.add_row(
            arm,
            f"{figures[f'{arm}_val_loss']:.3f}",
            f"{figures[f'{arm}_test_loss']:.3f}",
            f"{100 * figures[f'{arm}_test_acc']:.1f} %",
            f"{figures[f'{arm}_parameters']:,.0f}",
            _interval(figures, f"{arm}_gain_loss", ".3f"),
            _interval(figures, f"{arm}_gain_acc", ".1f"),
            _interval(figures, f"{arm}_vs_uniform_loss", ".3f"),
        )
    console = Console(stderr=True, highlight=False)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"failed: {row['arm']} on host {row['host']}: {row['error']}", style="red")


def _interval(figures: Mapping[str, float], name: str, form: str) -> str:
    if name not in figures:
        return ""
    value = f"{figures[name]:+{form}}"
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    return value if low is None or high is None else f"{value} [{low:+{form}}, {high:+{form}}]"
