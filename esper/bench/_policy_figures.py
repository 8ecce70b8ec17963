"""The judgement's figures, tables and forest plot, from its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from esper.atomic import replacing
from esper.bench._policy_arms import DOUBLE, LEARNED, LOOK_AHEAD, NO_GATE, NO_SHORTCUT, VALUE
from esper.tamiyo.judging.figures import NONE, ArmFigures, Board, Difference
from esper.tamiyo.judging.forest import ForestRow, forest_figure
from esper.tamiyo.judging.markdown import arms_table, differences_table, families_table
from esper.tamiyo.judging.matches import Group
from esper.tamiyo.judging.rules import ChosenRules
from esper.tamiyo.judging.trial import VIEWS, Trial, View
from esper.tamiyo.judging.units import SCRATCH

__all__ = ["collect", "tuned_figures", "write_pages"]

_GROUPS: dict[Group, str] = {
    "fresh": "fresh hosts of known families",
    "sealed": "hosts of sealed families",
}
_VIEW_NAMES: dict[View, str] = {"flops": "equal FLOPs", "steps": "equal steps"}
_PREFIXES: dict[View, str] = {"flops": "", "steps": "steps_"}
_BEST, _BY_PRICE = "best_rule", "best_rule_by_price"


def collect(trials: Sequence[Trial], arms: Sequence[str], rules: ChosenRules) -> dict[str, float]:
    """All figures of :func:`esper.bench.policy.run` that come from trials."""
    figures: dict[str, float] = {}
    for group in _GROUPS:
        for view in VIEWS:
            board = Board(trials, group, view, arms)
            prefix = f"{_PREFIXES[view]}{group}_"
            if view == "flops":
                figures[f"{group}_hosts"] = float(board.num_hosts)
                figures[f"{group}_matches"] = float(len(board.matches))
            if not board.matches:
                continue
            for name in arms:
                figures |= _arm(f"{prefix}{name}", board.arm(name))
            if LEARNED not in arms:
                continue
            for label, difference in _differences(board, rules):
                figures |= _difference(f"{prefix}over_{label}", difference)
            best = rules.views[view].best
            if best in arms:
                for family in board.families:
                    found = board.difference(LEARNED, best, family=family)
                    figures |= _difference(f"{prefix}over_{_BEST}_{family}", found)
            free = rules.views[view].best_shortcut_free
            if NO_SHORTCUT in arms and free in arms:
                figures |= _difference(
                    f"{prefix}{NO_SHORTCUT}_over_rule", board.difference(NO_SHORTCUT, free)
                )
            figures[f"{prefix}{LEARNED}_idle_sound"] = board.idle(LEARNED, "sound")
    return figures


def tuned_figures(chosen: ChosenRules) -> dict[str, float]:
    """Utility of each rule's best variant on validation hosts."""
    figures: dict[str, float] = {"hosts": float(len(chosen.hosts))}
    for view, choice in chosen.views.items():
        for rule, variant in chosen.variants.items():
            figures[f"{_PREFIXES[view]}{rule}_utility"] = choice.utilities[f"{rule}({variant})"]["drawn"]
    return figures


def write_pages(
    trials: Sequence[Trial],
    arms: Sequence[str],
    rules: ChosenRules,
    accuracies: Mapping[str, float],
    out: Path,
    notes: Sequence[str],
) -> None:
    """Write the tables, and the forest plot where a learned policy has played."""
    boards = {
        (group, view): board
        for group in _GROUPS
        for view in VIEWS
        if (board := Board(trials, group, view, arms)).matches
    }
    text = _page(boards, rules, accuracies, notes)
    with replacing(out.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if LEARNED in arms and boards:
        panels = {
            f"{_GROUPS[group][0].upper()}{_GROUPS[group][1:]} ({board.num_hosts} hosts)": _rows(board, rules)
            for (group, view), board in boards.items()
            if view == "flops"
        }
        forest_figure(
            panels,
            out.with_suffix(".png"),
            title="The learned policy against its rivals, at equal training FLOPs",
            axis="utility of the learned policy minus the rival's, nats at the end of the run "
            "(dot: mean, 95 % interval over hosts; bar: median)",
        )


def _page(
    boards: Mapping[tuple[Group, View], Board],
    rules: ChosenRules,
    accuracies: Mapping[str, float],
    notes: Sequence[str],
) -> str:
    parts = [f"{note}\n" for note in notes]
    for (group, view), board in boards.items():
        parts.append(
            f"### {_GROUPS[group][0].upper()}{_GROUPS[group][1:]}, {_VIEW_NAMES[view]}\n\n"
            f"{board.num_hosts} hosts, {len(board.matches)} runs of each arm.\n\n{arms_table(board)}\n"
        )
        best = rules.views[view].best
        if LEARNED in board.arms:
            named = [(_label(label, rules, view), found) for label, found in _differences(board, rules)]
            parts.append(f"Utility of `{LEARNED}` less that of:\n\n{differences_table(named)}\n")
        shown = [name for name in (LEARNED, best, DOUBLE) if name in board.arms]
        if view == "flops" and shown:
            parts.append(f"Mean (median) utility by family:\n\n{families_table(board, shown)}\n")
    if accuracies:
        rows = [
            f"| {split} | {accuracies[f'accuracy_{split}']:.3f} | {accuracies[f'accuracy_{split}_rule']:.3f} "
            f"| {accuracies[f'accuracy_{split}_utility']:+.3f} | {accuracies[f'accuracy_{split}_rule_utility']:+.3f} |"
            for split in ("test", "sealed")
            if f"accuracy_{split}" in accuracies
        ]
        head = ["| split | policy | best rule | policy U | best rule U |", "|---|---|---|---|---|"]
        parts.append("\n".join(["### Policy accuracy on the oracle table\n", *head, *rows, ""]))
    return "\n".join(parts)


def _differences(board: Board, rules: ChosenRules) -> list[tuple[str, Difference]]:
    """The learned policy against the best rules, and against every other arm."""
    choice = rules.views[board.view]
    found: list[tuple[str, Difference]] = []
    if choice.best in board.arms:
        found.append((_BEST, board.difference(LEARNED, choice.best)))
    if set(choice.best_by_price.values()) <= set(board.arms):
        by_price = {float(price): rule for price, rule in choice.best_by_price.items()}
        found.append((_BY_PRICE, board.difference(LEARNED, by_price)))
    found += [(name, board.difference(LEARNED, name)) for name in board.arms if name != LEARNED]
    return found


def _label(name: str, rules: ChosenRules, view: View) -> str:
    choice = rules.views[view]
    if name == _BEST:
        return f"best fixed rule ({choice.best})"
    if name == _BY_PRICE:
        return "best fixed rule for each price, waiting among them"
    return {
        NONE: "none: the ungrown host",
        DOUBLE: "the host at twice its learning rate",
        SCRATCH: "its final shape from scratch",
        VALUE: "the value model without PPO",
        NO_GATE: "without the uncertainty gate",
        NO_SHORTCUT: "without the shortcut action",
        LOOK_AHEAD: "look-ahead",
    }.get(name, name)


def _rows(board: Board, rules: ChosenRules) -> list[ForestRow]:
    """Against the rivals that matter, then against the best rule on each family."""
    best = rules.views[board.view].best
    shown = (_BEST, _BY_PRICE, NONE, DOUBLE, SCRATCH, LOOK_AHEAD, VALUE, NO_GATE)
    rows = [
        ForestRow(_label(name, rules, board.view), d.estimate, d.median, board.num_hosts, head=True)
        for name, d in _differences(board, rules)
        if name in shown
    ]
    for family in board.families if best in board.arms else []:
        d = board.difference(LEARNED, best, family=family)
        rows.append(ForestRow(f"{best}, on {family}", d.estimate, d.median, d.estimate.num))
    return rows


def _arm(prefix: str, found: ArmFigures) -> dict[str, float]:
    figures = {f"{prefix}_utility": found.utility.mean}
    if found.utility.interval is not None:
        figures |= {f"{prefix}_low": found.utility.interval[0], f"{prefix}_high": found.utility.interval[1]}
    figures |= {
        f"{prefix}_median": found.median,
        f"{prefix}_loss": found.loss,
        f"{prefix}_accuracy": found.accuracy,
        f"{prefix}_parameters": found.parameters,
        f"{prefix}_flops": found.flops,
        f"{prefix}_time": found.seconds,
        f"{prefix}_idle": found.idle,
        f"{prefix}_failed": float(found.failed),
    }
    if found.waited is not None:
        figures[f"{prefix}_wait"] = found.waited
    if found.fell_back is not None:
        figures[f"{prefix}_fallback"] = found.fell_back
    return figures


def _difference(name: str, found: Difference) -> dict[str, float]:
    figures = {name: found.estimate.mean, f"{name}_median": found.median}
    if found.estimate.interval is not None:
        figures |= {f"{name}_low": found.estimate.interval[0], f"{name}_high": found.estimate.interval[1]}
    return figures
