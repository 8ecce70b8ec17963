"""The model card that lies beside the weights, and the table on the terminal."""

from __future__ import annotations

from rich.table import Table

from esper.report.statistics import Estimate
from esper.tamiyo.pipeline.config import LearnConfig
from esper.tamiyo.pipeline.dataset import Dataset
from esper.tamiyo.pipeline.episodes import paired
from esper.tamiyo.pipeline.ppo import Ppo
from esper.tamiyo.pipeline.report import TARGET_ACCURACY, Line, Tabled
from esper.tamiyo.pipeline.supervised import Supervised

__all__ = ["LABELS", "interval", "model_card", "scores_table"]

LABELS = {"rule": "best fixed rule", "fallback": "fallback (expressivity)", "policy": "**policy**"}
_HEADS = ("chooser", "utility", "over the rule", "regret", "accuracy", "strict", "WAIT", "WAIT where best")


def model_card(
    config: LearnConfig, data: Dataset, found: Supervised, tabled: Tabled, ppo: Ppo | None, *, adopted: bool
) -> str:
    """Write what the weights are, what they were trained on, how they were judged and where they end."""
    policy = found.network.config
    families = sorted({case.record.family for case in data.train})
    counts = {
        name: len({c.record.host_key for c in getattr(data, name)})
        for name in ("train", "validation", "test")
    }
    gate = found.gate
    text = f"""# tamiyo: which seed, where, or wait

A graph network ({sum(p.numel() for p in found.network.parameters()):,} parameters, {policy.hidden_dim} channels,
{policy.num_gnn_layers} layers) that chooses one candidate of a decision point, WAIT among them. Made by
`esper learn policy --seed {config.seed}`{" with PPO" if adopted else ""}; its features are listed in the file's header.

## Data

Real trainings of small networks ({", ".join(families)}), each candidate tried to the end of the run
(experiments/oracle): {counts["train"]} hosts to learn from, {counts["validation"]} to choose and stop by,
{counts["test"]} to report on. Their tasks are scikit-learn's digits and sample pictures (BSD and CC BY), texts that
come with Python and its packages, and random teachers; nothing else was seen. Fashion-MNIST and tiny Shakespeare
are sealed: no training, choice or calibration has touched them. Weights and table come under the package's licence.

## Figures

Utility U = loss of WAIT - loss - λ·log(parameters / parameters of WAIT), held-out loss in nats at the end of the
run; means over hosts and over λ of {", ".join(f"{p:g}" for p in config.prices)}, with 95 % bootstrap intervals over
hosts. Accuracy: within 10 % of the best candidate's utility or within noise; strict: without that allowance.

"""
    for split in ("validation", "test"):
        text += (
            f"{split} hosts\n\n" + _markdown([line for line in tabled.lines if _shown(line, split)]) + "\n"
        )
    rules = ", ".join(f"{rule} at λ = {price:g}" for price, rule in tabled.rules.items())
    text += f"The best fixed rule is the best of ten on validation hosts: {rules}.\n\n"
    reached = f"with {tabled.experiences} states" if tabled.experiences is not None else "not reached"
    text += f"Learning speed: {TARGET_ACCURACY:.0%} accuracy on test hosts {reached}.\n\n"
    if ppo is not None:
        what = f"{ppo.share:.0%} of what it changed"
        text += f"PPO on whole runs with several decisions, by itself (paired hosts; {what}):\n\n"
        for split, played in ppo.played.items():
            text += (
                f"- {split}: adds {interval(played.added)} nats a run; over the best fixed rule, acting once, "
                f"{interval(paired(played.after, played.rule))}\n"
            )
        text += f"\nIt was {'adopted' if adopted else 'not adopted: the value model ships'}.\n\n"
    text += f"""## Thresholds

Confidence {gate.confidence:g}, chosen on validation hosts. Uncertainty {gate.chosen.uncertainty:g} and novelty
{gate.chosen.novelty:g}, above which policy `expressivity` decides, chosen by utility on validation hosts and on
families that were held out of training: the network decides in {gate.chosen.coverage:.0%} of the first and
{gate.chosen.coverage_unknown:.0%} of the second.

## Limits

Hosts had up to some ten thousand parameters and a few hundred to a thousand steps. On families that it was
not trained on, the network with its thresholds is worth {gate.chosen.unknown:.3f} nats, without them
{gate.never.unknown:.3f}, the rule `expressivity` {gate.always.unknown:.3f}. Large models are beyond what was measured.
"""
    return text


def scores_table(tabled: Tabled, split: str) -> Table:
    """Every chooser on one split, all prices together."""
    hosts = tabled.line(split, "policy").score.utility.num
    table = Table(title=f"{split}: one decision, {hosts} hosts, all prices (nats)", title_justify="left")
    for i, head in enumerate(_HEADS):
        table.add_column(head, justify="left" if i == 0 else "right")
    for line in tabled.lines:
        if _shown(line, split):
            bold = "bold" if line.chooser == "policy" else ""
            table.add_row(*(cell.strip("*") for cell in _cells(line)), style=bold)
    return table


def interval(estimate: Estimate) -> str:
    """A mean with its interval."""
    if estimate.interval is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} [{estimate.interval[0]:.3f}, {estimate.interval[1]:.3f}]"


def _shown(line: Line, split: str) -> bool:
    return line.split == split and line.price is None


def _markdown(lines: list[Line]) -> str:
    rows = [_HEADS, tuple("---" for _ in _HEADS), *(_cells(line) for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(line: Line) -> tuple[str, ...]:
    score = line.score
    where = score.wait_where_best
    return (
        LABELS.get(line.chooser, line.chooser),
        interval(score.utility),
        "" if line.chooser == "rule" else interval(line.above_rule),
        f"{score.regret.mean:.3f}",
        f"{score.accuracy.mean:.2f}",
        f"{score.strict.mean:.2f}",
        f"{score.wait:.2f}",
        "" if where is None else f"{where:.2f}",
    )
