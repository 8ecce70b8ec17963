"""What is a policy worth? Many arms train the same hosts on the same data, at equal FLOPs and at equal steps.

Hosts are fresh ones of known families, and ones of sealed families, on which nothing was learned or tuned. Each has
a price of parameters λ and a budget, drawn by its name and the same for all arms; a policy decides at all its
decision points, with frozen weights. At equal FLOPs an arm's schedule is compressed until all that it
spends (steps, statistics, measurements, culled seeds, look-ahead) is what the ungrown host spends on its whole
run. The figure is the utility at the end, U = (loss_none − loss) − λ·log(P / P_none), on the test part, which
steers nothing. Fixed rules have their options from validation hosts (``tune=true`` chooses them).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from esper.bench._record import write_record
from esper.bench._workers import run_all
from esper.errors import ConfigError

if TYPE_CHECKING:
    from esper.tamiyo.judging.arms import Arm
    from esper.tamiyo.judging.matches import Match
    from esper.tamiyo.judging.trial import Trial

__all__ = ["TARGETS", "TITLE", "run"]

TITLE = "Policy: the learned policy against every rival on fresh and on sealed hosts, at equal FLOPs"
TARGETS: dict[str, tuple[str, float]] = {
    "fresh_over_best_rule_low": (">", 0.0),
    "sealed_over_best_rule_high": (">=", 0.0),
    "accuracy_test": (">=", 0.85),
}
"""Better than the best fixed rule on fresh hosts of known families, no worse on sealed ones; policy accuracy."""

TABLE = Path("experiments/oracle/table")


def run(
    *,
    weights: str = "shipped",
    value_weights: str = "",
    policy_options: Mapping[str, Any] | None = None,
    hosts: int = 3,
    repeats: int = 1,
    families: Sequence[str] = (),
    arms: Sequence[str] = (),
    first_host: int = 0,
    minutes: float = 0.0,
    max_steps: int = 0,
    num_workers: int = 2,
    table: str = "",
    tune: bool = False,
    quick: bool = False,
    out: str = "",
) -> dict[str, float]:
    """Train all arms on all hosts and compare them.

    Args:
        weights: Of the policy network; ``shipped`` for the package's own, empty to compare the rules alone.
        value_weights: Of the value model that PPO began from, for an arm of its own.
        policy_options: Of policy ``tamiyo``, for all learned arms; those that it ships with if None.
        hosts: Of each family.
        repeats: Of each host, with other first weights and another order of the data.
        families: Only these; sealed ones are left out, with a note, where their data are not there.
        arms: Only these, beside ``none``.
        first_host: Number of the first host of each family.
        minutes: Begin nothing new after so long; 0 for no limit. What was not begun is left for the next call
            with the same ``out``.
        max_steps: Cut longer runs to so many steps, for trying things out; 0 leaves them as they are.
        num_workers: Processes; 0 runs everything in this one.
        table: Folder of the oracle table for the policy accuracy; empty for the committed one, if it is there.
        tune: Play all variants of all rules on validation hosts instead, and choose among them.
        quick: Two digits hosts, two arms, short runs, no learned policy.
        out: JSON file for the figures and every run. Beside it lie the same name with ``.jsonl``, from which an
            interrupted call goes on, and which says nothing that the JSON does not; ``.md`` with tables; and
            ``.png``. With ``tune`` it is the choice itself that is written, to be committed as
            ``esper/tamiyo/judging/rules.json``.

    Returns:
        For each group G (``fresh``, ``sealed``) and arm A: ``G_A_utility`` with ``_low`` and ``_high``,
        ``G_A_median``, ``G_A_loss``, ``G_A_accuracy``, ``G_A_parameters``, ``G_A_flops``, ``G_A_time``,
        ``G_A_idle``, of learned arms ``G_A_wait`` and ``G_A_fallback``; for the learned policy ``G_over_X`` with
        ``_low``, ``_high`` and ``_median`` for X in ``best_rule``, ``best_rule_by_price`` and the other arms, and
        ``G_over_best_rule_FAMILY``; ``G_no_shortcut_over_rule``. The same at equal steps begin with
        ``steps_``. ``accuracy_S``, ``accuracy_S_rule`` for splits S of the oracle table. ``G_hosts``, ``num_failed``,
        ``num_left`` (units that were not begun). With ``tune``: ``R_utility`` of each rule's best variant.

    Raises:
        ConfigError: An option is out of range, or there is no such family or arm.
        CheckpointError: Weights cannot be read.
        DataFormatError: The journal or the table is damaged.
    """
    from esper.bench._policy_arms import LEARNED, judged_arms
    from esper.bench._policy_figures import collect, tuned_figures, write_pages
    from esper.tamiyo.environment.families import KNOWN
    from esper.tamiyo.judging.matches import available, draw_matches
    from esper.tamiyo.judging.rules import choose_rules, frozen_rules, grid_arms, write_rules
    from esper.tamiyo.judging.units import SCRATCH

    if quick:
        families, hosts, repeats, weights, value_weights = ("digits_mlp",), 2, 1, "", ""
        arms, max_steps = ("shortcut",), max_steps or 150
    if minutes < 0 or max_steps < 0:
        raise ConfigError(f"minutes and max_steps should not be negative, got {minutes} and {max_steps}")
    if out and not Path(out).resolve().parent.is_dir():
        raise ConfigError(f"out expects a path in a folder that exists, got {out!r}")
    found, notes = available(families or (tuple(KNOWN) if tune else ()))
    matches = draw_matches(
        found,
        hosts=hosts,
        repeats=repeats,
        validation=tune,
        first_host=first_host,
        max_steps=max_steps or None,
    )
    _say(*notes)
    if tune:
        trials, left = _play(grid_arms(), matches, out, minutes, num_workers)
        chosen = choose_rules(trials)
        if out:
            write_rules(chosen, Path(out))
        return tuned_figures(chosen) | {"num_failed": float(chosen.failed), "num_left": float(left)}
    rules = frozen_rules()
    playing = judged_arms(
        rules, weights=weights, value_weights=value_weights, only=arms, options=policy_options
    )
    trials, left = _play(playing, matches, out, minutes, num_workers)
    names = [*playing, SCRATCH] if LEARNED in playing else list(playing)
    accuracies = _accuracies(table, weights) if LEARNED in playing and not quick else {}
    figures = collect(trials, names, rules) | accuracies
    figures |= {"num_failed": float(sum(trial.failed for trial in trials)), "num_left": float(left)}
    for trial in trials:
        if trial.failed:
            _say(
                f"failed: {trial.arm} on {trial.match} ({trial.view}): {trial.error or 'the loss is not finite'}"
            )
    if out:
        options = {
            "hosts": hosts, "repeats": repeats, "families": found, "first_host": first_host,
            "max_steps": max_steps, "notes": notes,
            "arms": {name: _without_folder(msgspec.to_builtins(arm)) for name, arm in playing.items()},
        }  # fmt: skip
        rows = [msgspec.to_builtins(trial) for trial in trials]
        write_record(out, benchmark="policy", options=options, figures=figures, runs=rows)
        write_pages(trials, names, rules, accuracies, Path(out), notes)
    return figures


def _without_folder(arm: dict[str, Any]) -> dict[str, Any]:
    """An arm as it is recorded: its weights are known by their digest, wherever they lay on this machine."""
    return arm | {"weights": Path(arm["weights"]).name} if "weights" in arm else arm


def _play(
    arms: Mapping[str, Arm], matches: Sequence[Match], out: str, minutes: float, num_workers: int
) -> tuple[list[Trial], int]:
    """Trials of all units, those of an earlier call among them; and how many units were not begun."""
    from esper.tamiyo.judging.units import Unit, read_journal, work

    journal = Path(out).with_suffix(".jsonl") if out else None
    deadline = time.time() + 60.0 * minutes if minutes else math.inf
    units = [
        Unit(name, arm, match, str(journal or ""), deadline)
        for match in matches
        for name, arm in arms.items()
    ]
    known = read_journal(journal) if journal else {}
    open_units = [unit for unit in units if unit.key not in known]
    if len(open_units) < len(units):
        _say(f"{len(units) - len(open_units)} of {len(units)} units are in {journal} already")
    results = run_all(work, open_units, title="policy", num_workers=num_workers, prepare=_one_thread)
    played = {
        unit.key: trials for unit, trials in zip(open_units, results, strict=True) if trials is not None
    }
    done = known | played
    trials = [trial for unit in units for trial in done.get(unit.key, [])]
    return trials, sum(unit.key not in done for unit in units)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _accuracies(table: str, weights: str) -> dict[str, float]:
    from esper.tamiyo.judging.accuracy import table_accuracy

    folder = Path(table) if table else TABLE
    if not table and not folder.is_dir():
        _say(f"no policy accuracy: there is no oracle table at {folder}")
        return {}
    figures: dict[str, float] = {}
    for split, found in table_accuracy(folder, weights).items():
        name = f"accuracy_{split}"
        figures |= {name: found.policy.mean, f"{name}_rule": found.rule.mean}
        if found.policy.interval is not None:
            figures |= {f"{name}_low": found.policy.interval[0], f"{name}_high": found.policy.interval[1]}
        figures |= {
            f"{name}_utility": found.policy_utility.mean,
            f"{name}_rule_utility": found.rule_utility.mean,
            f"{name}_fallback": found.fell_back,
            f"{name}_states": float(found.num_states),
        }
    return figures


def _say(*lines: Any) -> None:
    for line in lines:
        print(line, file=sys.stderr)
