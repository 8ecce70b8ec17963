"""``learning.png``: how a policy was learned and what it is worth, on one page that could stand in a talk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esper.atomic import replacing
from esper.report.figure import CONTROL_COLOURS, GROWTH_COLOUR, LEAST_HEIGHT, STYLE, WIDTH
from esper.report.statistics import Estimate
from esper.tamiyo.pipeline.ppo import Ppo
from esper.tamiyo.pipeline.report import TARGET_ACCURACY, Tabled
from esper.tamiyo.pipeline.supervised import Supervised

__all__ = ["learning_figure"]

_SHOWN = ("policy", "value model", "boosting", "rule", "fallback")
_ORANGE, _GREEN = CONTROL_COLOURS[:2]


def learning_figure(found: Supervised, tabled: Tabled, ppo: Ppo | None, path: Path) -> Path:
    """Draw a learning.

    Args:
        found: The supervised stage.
        tabled: Scores.
        ppo: The PPO stage; None where it was not run.
        path: Where to; PNG.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, LEAST_HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        _fits(axes[0, 0], found, tabled)
        _experiences(axes[0, 1], tabled)
        if ppo is None:
            _prices(axes[1, 0], tabled)
        else:
            _returns(axes[1, 0], ppo)
        _choosers(axes[1, 1], tabled)
        hosts = tabled.line("test", "policy").score.utility.num
        figure.suptitle(
            f"Learning to grow: {tabled.curve[-1].num_states} states tried to the end, {hosts} fresh hosts to judge by",
            fontsize=14, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _fits(axes: Axes, found: Supervised, tabled: Tabled) -> None:
    axes.set_title("Regret on validation hosts while value models are fitted")
    for fits, colour, label in (
        (found.members, _ORANGE, "on the table"),
        (found.students, GROWTH_COLOUR, "students"),
    ):
        for i, fitted in enumerate(fits):
            values = [epoch["regret"] for epoch in fitted.history]
            axes.plot(values, color=colour, linewidth=1.1, alpha=0.7, label=label if i == 0 else None)
            axes.plot(fitted.best_epoch, values[fitted.best_epoch], "o", color=colour, markersize=5)
    best = tabled.line("validation", "rule").score
    oracle = float(np.mean([f.history[0]["utility/best"] for f in found.members]))
    axes.axhline(
        oracle - best.utility.mean, color="#000000", linestyle=":", linewidth=1.2, label="best fixed rule"
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats")
    axes.legend()


def _experiences(axes: Axes, tabled: Tabled) -> None:
    axes.set_title("Learning speed")
    states = [point.num_states for point in tabled.curve]
    for split, colour in (("validation", _ORANGE), ("test", GROWTH_COLOUR)):
        accuracy = [getattr(point, split).accuracy for point in tabled.curve]
        axes.errorbar(
            states, [a.mean for a in accuracy], yerr=_bars(accuracy), color=colour, marker="o", markersize=5,
            linewidth=1.6, capsize=2.5, elinewidth=1.0, label=f"{split} hosts",
        )  # fmt: skip
    axes.axhline(TARGET_ACCURACY, color="#000000", linestyle=":", linewidth=1.2)
    said = "not reached" if tabled.experiences is None else f"reached with {tabled.experiences}"
    axes.annotate(
        f"{TARGET_ACCURACY:.0%}: {said}", (0.99, TARGET_ACCURACY), xycoords=("axes fraction", "data"), ha="right",
        va="bottom", fontsize=9.5,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(states, [str(s) for s in states])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("states of the table seen")
    axes.set_ylabel("policy accuracy")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.78))


def _returns(axes: Axes, ppo: Ppo) -> None:
    axes.set_title("PPO on whole runs")
    returns = np.array([metrics["return/mean"] for metrics in ppo.rounds])
    steps = [metrics["experiences"] for metrics in ppo.rounds]
    axes.plot(steps, returns, color=GROWTH_COLOUR, alpha=0.35, linewidth=1.0)
    smooth = [returns[max(0, i - 4) : i + 1].mean() for i in range(len(returns))]
    axes.plot(steps, smooth, color=GROWTH_COLOUR, linewidth=1.8, label="return, mean of five rounds")
    axes.axhline(0.0, color="#000000", linestyle=":", linewidth=1.2)
    lines = []
    for split, played in ppo.played.items():
        added = played.added
        low, high = added.interval or (added.mean, added.mean)
        lines.append(f"{split} hosts: PPO adds {added.mean:+.3f} nats [{low:+.3f}, {high:+.3f}]")
    axes.set_xlabel("decisions learned from\n" + "\n".join(lines))
    axes.set_ylabel("nats a run")
    axes.legend()


def _prices(axes: Axes, tabled: Tabled) -> None:
    axes.set_title("At each price of parameters")
    prices = sorted({line.price for line in tabled.lines if line.price is not None})
    for name, colour in (("policy", GROWTH_COLOUR), ("rule", _ORANGE)):
        found = [tabled.line("test", name, price).score.utility for price in prices]
        axes.errorbar(
            range(len(prices)), [e.mean for e in found], yerr=_bars(found), color=colour, marker="o", capsize=2.5,
            linewidth=1.6, label={"rule": "best fixed rule"}.get(name, name),
        )  # fmt: skip
    axes.set_xticks(range(len(prices)), [f"λ = {price:g}" for price in prices])
    axes.set_ylabel("utility on test hosts, nats")
    axes.legend()


def _choosers(axes: Axes, tabled: Tabled) -> None:
    axes.set_title("Utility of one decision on fresh hosts, all prices")
    found = [tabled.line("test", name).score.utility for name in _SHOWN]
    colours = [GROWTH_COLOUR, "#56B4E9", _GREEN, _ORANGE, "#BBBBBB"]
    places = np.arange(len(_SHOWN))[::-1]
    axes.barh(places, [e.mean for e in found], xerr=_bars(found), color=colours, capsize=2.5, height=0.62)
    labels = {"rule": "best fixed rule", "fallback": "fallback (expressivity)", "policy": "policy"}
    axes.set_yticks(places, [labels.get(name, name) for name in _SHOWN])
    axes.axvline(0.0, color="#000000", linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("nats of held-out loss over WAIT, parameters paid for")


def _bars(found: Sequence[Estimate]) -> np.ndarray:
    """Lengths of error bars [2, n]; none where there is no interval."""
    ends = [estimate.interval or (estimate.mean, estimate.mean) for estimate in found]
    means = np.array([estimate.mean for estimate in found])
    return np.abs(np.array(ends).T - means)
