"""A learning from end to end: learn, judge, write everything down, and ship what is worth it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rich.console import Console

from esper.tamiyo.pipeline.artefacts import (
    FIGURE,
    METRICS,
    RESULT,
    write_metrics,
    write_result,
    write_weights,
)
from esper.tamiyo.pipeline.artefacts import (
    install as install_weights,
)
from esper.tamiyo.pipeline.card import interval, model_card, scores_table
from esper.tamiyo.pipeline.config import LearnConfig
from esper.tamiyo.pipeline.figure import learning_figure
from esper.tamiyo.pipeline.learn import Learned, learn
from esper.tamiyo.pipeline.report import TARGET_ACCURACY

__all__ = ["run"]


def run(config: LearnConfig, console: Console, *, install: bool = False, package: Path | None = None) -> int:
    """Learn a policy and leave everything in ``config.out``.

    Args:
        config: Of the learning.
        console: Shows how far it is, and the tables at the end.
        install: Copy the weights into the package, if their utility on validation hosts is not below that of
            the best fixed rule.
        package: Folder of the weights that ship; this installation's if None.

    Returns:
        0, or 1 when weights were to be installed that are not worth it.

    Raises:
        EsperError: See :func:`~esper.tamiyo.pipeline.learn.learn`.
    """
    found = learn(config, console)
    name = found.supervised.name + (
        f" + {found.ppo.share:g} PPO" if found.ppo is not None and found.adopted else ""
    )
    card = model_card(config, found.data, found.supervised, found.tabled, found.ppo, adopted=found.adopted)
    path = write_weights(found.network, card, config.out)
    write_metrics(found.supervised, found.ppo, config.out / METRICS)
    write_result(
        config, found.data.digest, found.supervised, found.tabled, found.ppo, name, config.out / RESULT
    )
    learning_figure(found.supervised, found.tabled, found.ppo, config.out / FIGURE)
    _show(found, console)
    console.print(f"{path} ({path.stat().st_size:,} bytes): {name}", soft_wrap=True)
    if not install:
        return 0
    return _install(found, config.out, package or _package(), console)


def _install(found: Learned, folder: Path, package: Path, console: Console) -> int:
    over = found.tabled.line("validation", "policy").above_rule
    if over.mean < 0:
        console.print(
            f"not installed: on validation hosts the policy is worth {interval(over)} nats against the best fixed "
            "rule; what shipped before, or policy 'expressivity', stays the default",
            soft_wrap=True,
        )
        return 1
    console.print(f"installed as {install_weights(folder, package)}", soft_wrap=True)
    return 0


def _package() -> Path:
    return Path(str(resources.files("esper.tamiyo") / "weights"))


def _show(found: Learned, console: Console) -> None:
    for split in ("validation", "test"):
        console.print(scores_table(found.tabled, split))
    reached = found.tabled.experiences
    said = "not reached" if reached is None else f"with {reached} states of the table"
    console.print(f"{TARGET_ACCURACY:.0%} policy accuracy on test hosts: {said}", soft_wrap=True)
    if found.ppo is not None:
        for split, played in found.ppo.played.items():
            console.print(f"PPO adds on {split} hosts: {interval(played.added)} nats a run", soft_wrap=True)
